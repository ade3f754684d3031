"""Every public operation, compiled for accelerators that are not there: a matrix of marks.

Each operation is compiled by the chips' own compilers, forward and as a gradient, in float32 and
bfloat16; nothing is run. A mark is the memory that the program takes for temporaries on a chip, in
MiB, forward and backward, with the kernels of the vendor or of Pallas that it calls. A cross is an
error, which stands below the table.
Command: `python -m benchmarks marks --target v5e:4x4 --only matmul`
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import time
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import tyro

from wsekern.error_line import print_error
from wsekern.progress import show_progress

if TYPE_CHECKING:
    from benchmarks.operations.case import OperationCase
    from wsekern.wafer.wafer import Wafer

_DTYPES = ("float32", "bfloat16")
_DIRECTIONS = ("forward", "backward")
_MADE_BY = ("jax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarksOptions:
    """Compile every public operation for chips that are not there, and say what came of it."""

    target: tuple[str, ...] = ("v5e:4x4", "v6e:4x4", "v5p:4x4x4")
    """Chips to compile for; GPUs (h100:2x4) need JAX's CUDA plugin."""
    grid: str | None = None
    """Lay the chips out as HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH instead of as each target does."""
    only: tuple[str, ...] = ()
    """Operations whose names contain one of these words; by default all."""
    dtypes: tuple[str, ...] = _DTYPES
    """Of the floating operands."""
    merge: tuple[pathlib.Path, ...] = ()
    """Files of earlier runs' --json, whose marks come into the table and are not made again."""
    json: pathlib.Path | None = None
    """Write the marks to this file as JSON, after each operation."""
    summary: bool = False
    """Show one row for each public name: how many of its programs compiled, and the most memory."""
    out: pathlib.Path | None = None
    """Write the table to this file as Markdown, beside printing it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """What came of one compilation."""

    operation: str
    target: str
    dtype: str
    direction: str  # "forward" or "backward"
    temporaries: int | None = None  # bytes of a chip
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0  # to trace and compile
    error: str = ""  # its first line
    note: str = ""  # why the kernels of a program that compiled are not known

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What it is the mark of."""
        return self.operation, self.target, self.dtype, self.direction


def main(argv: list[str] | None = None) -> None:
    """Prints the table; exits with status 1 if an operation did not compile, 2 if none could be."""
    options = tyro.cli(MarksOptions, prog="python -m benchmarks marks", args=argv)
    # No device of this machine is needed, and libtpu would look for TPUs.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        marks = {mark.key: mark for path in options.merge for mark in read(path)}
        for mark in _compile_all(options, marks):
            marks[mark.key] = mark
            if options.json:
                _write(options.json, list(marks.values()))
    except (ValueError, OSError, ImportError) as error:
        print_error("benchmarks marks", error)
        raise SystemExit(2) from None
    text = summary(marks.values()) if options.summary else table(marks.values())
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if any(mark.error for mark in marks.values()):
        raise SystemExit(1)


def read(path: pathlib.Path) -> list[Mark]:
    """The marks of an earlier run's --json."""
    return [Mark(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["marks"]]


def _write(path: pathlib.Path, marks: list[Mark]) -> None:
    entries = [dataclasses.asdict(mark) for mark in marks]
    path.write_text(json.dumps({"made by": versions(), "marks": entries}, indent=1))


def versions() -> dict[str, str]:
    """The compilers' packages that are installed, and the date."""
    found = {"date": datetime.date.today().isoformat()}
    for name in _MADE_BY:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def all_cases(wafer: Wafer, dtype: str) -> Iterator[OperationCase]:
    """Every public operation, with operands for this wafer."""
    import numpy as np

    from benchmarks.operations import fields, language, moves
    from benchmarks.operations.case import OperandShapes

    operands = OperandShapes(wafer, np.dtype(dtype))
    for family in (language, fields, moves):
        yield from (case for case in family.cases(operands) if case.needs(wafer))


def compile_case(case: OperationCase, wafer: Wafer, direction: str) -> Any:
    """The operation or its gradient as compiled for `wafer`, a `wk.Compilation`."""
    import wsekern as wk
    from benchmarks.operations.case import gradient

    function = case.function if direction == "forward" else gradient(case.function)
    return wk.compile(
        lambda *operands: function(*operands), *case.operands, wafer=wafer, roofline=False
    )


def _compile_all(options: MarksOptions, made: Container[tuple[str, ...]]) -> Iterator[Mark]:
    from wsekern.wafer.launch import make_topology

    for chips in options.target:
        wafer = make_topology(chips, options.grid)
        target = chips if options.grid is None else f"{chips} as {options.grid}"
        for dtype in options.dtypes:
            for case in all_cases(wafer, dtype):
                if options.only and not any(word in case.name for word in options.only):
                    continue
                for direction in _DIRECTIONS if case.has_gradient else _DIRECTIONS[:1]:
                    if (case.name, target, dtype, direction) in made:
                        continue
                    with show_progress(f"{target}: {case.name}, {dtype}, {direction}"):
                        mark = _mark(case, wafer, direction)
                    yield dataclasses.replace(mark, target=target, dtype=dtype)


def _mark(case: OperationCase, wafer: Wafer, direction: str) -> Mark:
    began = time.perf_counter()
    mark = Mark(operation=case.name, target="", dtype="", direction=direction)
    try:
        compiled = compile_case(case, wafer, direction)
    except Exception as error:  # whatever it is, it is what the table is to show
        text = next(iter(str(error).strip().splitlines()), "")
        mark = dataclasses.replace(mark, error=f"{type(error).__name__}: {text}"[:300])
    else:
        mark = dataclasses.replace(
            mark,
            temporaries=compiled.memory.temporaries,
            kernels=compiled.kernels,
            error="" if compiled.fits else compiled.memory.refusal[:300],
            note=compiled.why_no_schedule[:300] if compiled.fits else "",
        )
    return dataclasses.replace(mark, seconds=round(time.perf_counter() - began, 2))


def table(marks: Iterable[Mark]) -> str:
    """The marks as a Markdown table, with errors and notes below it."""
    marks = list(marks)
    columns = list(dict.fromkeys((mark.target, mark.dtype) for mark in marks))
    rows = list(dict.fromkeys(mark.operation for mark in marks))
    found = {mark.key: mark for mark in marks}
    notes: dict[str, int] = {}
    lines = ["| operation | " + " | ".join(f"{t} {d}" for t, d in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for row in rows:
        cells = [
            _cell([found.get((row, *column, direction)) for direction in _DIRECTIONS], notes)
            for column in columns
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    compiled = sum(not mark.error for mark in marks)
    seconds = sum(mark.seconds for mark in marks)
    lines += ["", f"{compiled} of {len(marks)} compiled, in {seconds:,.0f} s. A cell has MiB of"]
    lines[-1] += " temporaries a chip, forward / backward, and kernels; - stands for no gradient."
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines)


def summary(marks: Iterable[Mark]) -> str:
    """One row for each public name: programs compiled of those tried, and the most temporaries."""
    marks = list(marks)
    targets = list(dict.fromkeys(mark.target for mark in marks))
    groups: dict[tuple[str, str], list[Mark]] = collections.defaultdict(list)
    for mark in marks:
        groups[_public_name(mark), mark.target].append(mark)
    lines = ["| operation | " + " | ".join(targets) + " |", "|---|" + "---:|" * len(targets)]
    for name in dict.fromkeys(_public_name(mark) for mark in marks):
        cells = [_summary_cell(groups[name, target]) for target in targets]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *sorted({mark.error for mark in marks if mark.error})])


def _public_name(mark: Mark) -> str:
    return re.split(r"[ ,]", mark.operation)[0]


def _summary_cell(marks: list[Mark]) -> str:
    if not marks:
        return "-"
    compiled = [mark for mark in marks if not mark.error]
    most = max((mark.temporaries or 0 for mark in compiled), default=0)
    return f"{len(compiled)} of {len(marks)}, {most / 2**20:.3g} MiB"


def _cell(marks: list[Mark | None], notes: dict[str, int]) -> str:
    parts: list[str] = []
    kernels: collections.Counter[str] = collections.Counter()
    for mark in marks:
        if mark is None:
            parts.append("-")
        elif mark.error:
            parts.append(f"✗{notes.setdefault(mark.error, len(notes) + 1)}")
        else:
            parts.append(f"{(mark.temporaries or 0) / 2**20:.3g}")
            kernels.update(mark.kernels)
            if mark.note:
                kernels[f"note {notes.setdefault(mark.note, len(notes) + 1)}"] += 1
    if marks[0] is None and marks[1] is None:
        return ""
    names = f" ({', '.join(sorted(kernels))})" if kernels else ""
    return " / ".join(parts) + names
