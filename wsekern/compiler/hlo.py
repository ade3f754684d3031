"""Read the text of a compiled program: XLA's scheduled HLO, as `Compiled.as_text()` gives it.

A program consists of computations, and a computation of instructions in the order in which they
run:

    %body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
      %p = (s32[], f32[8,128]{1,0}) parameter(0)
      %x = f32[8,128]{1,0} get-tuple-element(%p), index=1
      ROOT %y = f32[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={...}
    }

Only what the other modules ask for is kept. Text that is not understood raises no error: it makes
an instruction without operands, whose opcode nobody knows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_END = re.compile(r'^\}(, execution_thread="[^"]*")?$')  # of a computation, maybe on other cores
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_SEVERAL = re.compile(r"\b(branch|called)_computations=\{([^}]*)\}")
_TABLE_ROW = re.compile(r"^(\d+) (.*)$")
_FIELD = re.compile(r"(\w+)=(\d+)")
_UNKNOWN_CYCLES = 2**63 - 1  # what the compiler of TPUs writes where it does not know
_DEEPEST_STACK = 500  # frames; a table that goes in a circle ends there


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one array: dtype as HLO writes it ("bf16"), and dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes of the array, without padding; formats of 8 bits have no entry of their own."""
        return self.size * _BITS.get(self.dtype, 8) / 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of its result; several if that is a tuple
    operands: tuple[str, ...]  # names of instructions of the same computation
    arguments: str  # the text between the opcode's parentheses: "%a, %b", or a constant's value
    attributes: str  # the text after the operands
    called: dict[str, str]  # computations by role: "calls", "body", "condition", "branch 0" ...

    @property
    def bytes(self) -> float:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate; None where it made none."""
        match = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        cycles = int(match[1]) if match else _UNKNOWN_CYCLES
        return None if cycles == _UNKNOWN_CYCLES else cycles

    @functools.cached_property
    def operation(self) -> str:
        """What the user's program calls it: "jit(f)/dot_general"; "" where it does not say."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def target(self) -> str:
        """What a custom call calls; "" for any other instruction."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def frame(self) -> int | None:
        """The number of its stack frame in the program's table; None without."""
        match = re.search(r"stack_frame_id=(\d+)", self.attributes)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A list of instructions in the order of the schedule."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction | None

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Its instructions by name."""
        return {one.name: one for one in self.instructions}

    @functools.cached_property
    def readers(self) -> dict[str, Instruction]:
        """For each instruction that is read, by name, the first one that reads it."""
        found: dict[str, Instruction] = {}
        for one in self.instructions:
            for name in one.operands:
                found.setdefault(name, one)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Its parameters by number."""
        own = [one for one in self.instructions if one.opcode == "parameter"]
        return {int(one.arguments): one for one in own if one.arguments.isdigit()}


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call in a stack: a line of a source file."""

    file: str
    function: str
    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[Frame, ...]]  # innermost line first

    @property
    def main(self) -> Computation:
        """The computation that the program begins with."""
        return self.computations[self.entry]

    def called(self, instruction: Instruction) -> Iterator[tuple[str, Computation]]:
        """The computations that an instruction calls, with their roles."""
        for role, name in instruction.called.items():
            if name in self.computations:
                yield role, self.computations[name]


def parse(text: str) -> Program:
    """The program that `text` is.

    Raises:
      ValueError: it has no ENTRY computation.
    """
    tables: dict[str, dict[int, str]] = {}
    computations: dict[str, Computation] = {}
    entry, name, table = "", "", ""
    instructions: list[Instruction] = []
    root: Instruction | None = None
    for line in _whole_lines(text):
        if name:
            if _END.match(line):
                computations[name] = Computation(name, tuple(instructions), root)
                name, instructions, root = "", [], None
            elif match := _LINE.match(line):
                instruction = _instruction(match[2], match[3])
                instructions.append(instruction)
                root = instruction if match[1] else root
            continue
        if match := _HEAD.match(line):
            name, table = match[2], ""
            entry = name if match[1] else entry
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
            tables[table] = {}
        elif table and (match := _TABLE_ROW.match(line)):
            tables[table][int(match[1])] = match[2]
    if entry not in computations:
        raise ValueError("the text of the program has no ENTRY computation")
    return Program(computations, entry, _frames(tables))


def _whole_lines(text: str) -> Iterator[str]:
    """The lines, each instruction in one: the metadata of a Pallas kernel has line breaks in it."""
    whole = ""
    for line in text.splitlines():
        if not whole:
            whole = line
        elif _is_begin(line):
            yield whole
            whole = line
        else:
            whole = f"{whole} {line.strip()}"
    if whole:
        yield whole


def _is_begin(line: str) -> bool:
    """Whether something new begins: an instruction, a computation or its end, a table, a row."""
    if not line or _END.match(line) or line[0] not in ' \t{}[]"':
        return True
    return _LINE.match(line) is not None


def _instruction(name: str, text: str) -> Instruction:
    end = _end_of_type(text)
    shapes = tuple(
        Shape(dtype, tuple(int(d.strip("<=")) for d in dims.split(",") if d))
        for dtype, dims in _SHAPE.findall(_without_layouts(text[:end]))
    )
    opcode, _, rest = text[end:].lstrip().partition("(")
    close = _matching(rest)
    arguments, attributes = rest[:close], rest[close + 1 :]
    called = dict(_CALLED.findall(attributes))
    for role, text_of_names in _SEVERAL.findall(attributes):
        names = [one.strip().lstrip("%") for one in text_of_names.split(",")]
        called |= {f"{role} {i}": one for i, one in enumerate(names)}
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        shapes=shapes,
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=attributes,
        called=called,
    )


def _end_of_type(text: str) -> int:
    """Where the type at the start of `text` ends; a tuple's has spaces and parentheses in it."""
    depth = 0
    for i, letter in enumerate(text):
        if letter in "({[":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == " " and depth == 0:
            return i
    return len(text)


def _matching(text: str) -> int:
    """Where the parenthesis that is open before `text` closes."""
    depth, quoted = 1, False
    for i, letter in enumerate(text):
        if letter == '"' and (i == 0 or text[i - 1] != "\\"):
            quoted = not quoted
        elif not quoted and letter == "(":
            depth += 1
        elif not quoted and letter == ")":
            depth -= 1
            if depth == 0:
                return i
    return len(text)


def _without_layouts(text: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", text)


def _frames(tables: dict[str, dict[int, str]]) -> dict[int, tuple[Frame, ...]]:
    """Each stack frame as the lines from the innermost call outward."""
    files = {i: row.strip('"') for i, row in tables.get("FileNames", {}).items()}
    functions = {i: row.strip('"') for i, row in tables.get("FunctionNames", {}).items()}
    lines = {}
    for i, row in tables.get("FileLocations", {}).items():
        fields = {key: int(value) for key, value in _FIELD.findall(row)}
        lines[i] = Frame(
            files.get(fields.get("file_name_id", 0), ""),
            functions.get(fields.get("function_name_id", 0), ""),
            fields.get("line", 0),
        )
    links = {
        i: {key: int(value) for key, value in _FIELD.findall(row)}
        for i, row in tables.get("StackFrames", {}).items()
    }
    # XLA writes a caller's number plus one, so that 1 means none. A frame cannot call itself: where
    # one seems to, numbers are of this kind.
    offset = int(any(row.get("parent_frame_id") == i for i, row in links.items()))
    frames: dict[int, tuple[Frame, ...]] = {}
    for i in links:
        stack: list[Frame] = []
        at = i
        while at in links and len(stack) < _DEEPEST_STACK:
            stack.append(lines.get(links[at].get("file_location_id", 0), Frame("", "", 0)))
            at = links[at].get("parent_frame_id", 0) - offset
        frames[i] = tuple(stack)
    return frames
