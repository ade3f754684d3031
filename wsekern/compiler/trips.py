"""How often a loop of a compiled program runs: read off its condition and its body.

XLA's GPU compiler writes the number down. Its TPU compiler does not, but a counted loop can be
read: where its counter starts, what a trip adds, and which comparison ends it. All three are
integers that follow from constants, which `_Reader` computes. What it cannot follow, such as a
bound that arrives with the data, makes the count unknown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

from wsekern.compiler.hlo import Computation, Instruction, Program

_MOST_TRIPS = 2**40
_DEEPEST = 400  # instructions that depend on one another

_Number: TypeAlias = int | None  # None where it is not known
_Place = tuple[int, ...]  # which element of a tuple: () the value itself, (2,) its third element

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}
_DIRECTIONS: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_SAME = {"copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "copy-start"}


def trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs its body; None if the text does not say.

    Args:
      program: which the loop is in.
      computation: which has the loop.
      loop: the instruction.
    """
    written = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if written:
        return int(written[1])
    called = dict(program.called(loop))
    condition, body = called.get("condition"), called.get("body")
    if condition is None or body is None or not loop.operands:
        return None
    reader = _Reader(program)
    start: dict[int, int] = {}
    for place in _counters(condition):
        value = reader.value(computation, loop.operands[0], (place,), {})
        if value is not None:
            start[place] = value
    # What the condition reads, and how a trip changes it; what it leaves alone has a step of 0.
    steps: dict[int, int] = {}
    for place, first in start.items():
        second = reader.value(body, _root(body), (place,), _parameters(start))
        if second is None:
            return None
        steps[place] = second - first

    def goes_on(trips: int) -> bool | None:
        state = {place: first + trips * steps[place] for place, first in start.items()}
        value = reader.value(condition, _root(condition), (), _parameters(state))
        return None if value is None else bool(value)

    return _first_end(goes_on)


def _first_end(goes_on: Callable[[int], bool | None]) -> int | None:
    """The number of trips after which a loop ends for the first time."""
    if goes_on(0) is None:
        return None
    if not goes_on(0):
        return 0
    most = 1
    while goes_on(most):
        most *= 2
        if most > _MOST_TRIPS:
            return None
    least = most // 2
    while least + 1 < most:
        middle = (least + most) // 2
        least, most = (middle, most) if goes_on(middle) else (least, middle)
    return most


def _counters(condition: Computation) -> set[int]:
    """Which elements of the carried tuple a condition may read."""
    return {
        int(match[1])
        for one in condition.instructions
        if one.opcode == "get-tuple-element"
        and (match := re.search(r"index=(\d+)", one.attributes))
    }


def _parameters(state: Mapping[int, int]) -> dict[tuple[int, _Place], int]:
    return {(0, (place,)): value for place, value in state.items()}


def _root(computation: Computation) -> str:
    return computation.root.name if computation.root else ""


class _Reader:
    """Computes integers of a program that follow from constants and from known parameters."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def value(
        self,
        computation: Computation,
        name: str,
        place: _Place,
        known: Mapping[tuple[int, _Place], int],
        depth: int = 0,
    ) -> _Number:
        """The integer that an instruction gives, or that stands at a place of its tuple.

        Args:
          computation: which has the instruction.
          name: the instruction's.
          place: which element of its result.
          known: values of elements of the computation's parameters, by parameter and place.
          depth: how many calls led here.
        """
        one = computation.by_name.get(name)
        if one is None or depth > _DEEPEST:
            return None

        def operand(index: int, place: _Place) -> _Number:
            if index >= len(one.operands):
                return None
            return self.value(computation, one.operands[index], place, known, depth + 1)

        match one.opcode:
            case "parameter":
                number = int(one.arguments) if one.arguments.isdigit() else 0
                return known.get((number, place))
            case "constant":
                text = one.arguments.strip("{} ")
                if text in ("true", "false"):
                    return int(text == "true")
                return int(text) if re.fullmatch(r"-?\d+", text) else None
            case "tuple":
                return operand(place[0], place[1:]) if place else None
            case "get-tuple-element":
                match = re.search(r"index=(\d+)", one.attributes)
                return operand(0, (int(match[1]), *place)) if match else None
            case "compare":
                direction = re.search(r"direction=(\w\w)", one.attributes)
                a, b = operand(0, ()), operand(1, ())
                if direction is None or a is None or b is None:
                    return None
                return int(_DIRECTIONS[direction[1]](a, b))
            case "not":
                a = operand(0, ())
                return None if a is None else int(not a)
            case "fusion" | "call":
                return self._call(one, computation, place, known, depth)
            case opcode if opcode in _SAME:
                return operand(0, place)
            case opcode if opcode in _BINARY:
                a, b = operand(0, ()), operand(1, ())
                return None if a is None or b is None else _BINARY[opcode](a, b)
        return None

    def _call(
        self,
        one: Instruction,
        computation: Computation,
        place: _Place,
        known: Mapping[tuple[int, _Place], int],
        depth: int,
    ) -> _Number:
        inner = next((c for _, c in self.program.called(one)), None)
        if inner is None:
            return None
        values: dict[tuple[int, _Place], int] = {}
        for i, name in enumerate(one.operands):
            value = self.value(computation, name, (), known, depth + 1)
            if value is not None:
                values[i, ()] = value
        return self.value(inner, _root(inner), place, values, depth + 1)
