"""This file is where a flood starts, if a trace says so: on the PE whose number it compares with.

`fabric.broadcast` keeps the root's tile by such a comparison, and zeros elsewhere. A root that a
loop counts is not told here: its floods start on one PE after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from wsekern.estimator import trace

_SAME = frozenset({"pvary", "pcast", "convert_element_type", "copy"})


class _Number(NamedTuple):
    """A number that PEs have: a sum of places along axes, each so many times, and a constant."""

    times: dict[str, int]
    constant: int


def find_flood_roots(jaxpr: Any) -> dict[int, dict[str, int]]:
    """The root's place along each axis, by the id of the equation that floods."""
    # Differentiation leaves some behind that flood nothing.
    floods = [e for e in jaxpr.eqns if e.params.get("name") == "flood" and e.invars]
    if not floods:
        return {}
    made = {v: e for e in jaxpr.eqns for v in e.outvars}
    found = {}
    for equation in floods:
        kept = _producer(equation.invars[0], made)
        if kept is None or not (
            kept.primitive.name == "select_n" or kept.params.get("name") == "_where"
        ):
            continue
        compared = _producer(kept.invars[0], made)
        if compared is not None and compared.primitive.name == "eq":
            places = _solved([_number(v, made) for v in compared.invars])
            if places:
                found[id(equation)] = places
    return found


def _producer(atom: Any, made: Mapping[Any, Any]) -> Any:
    return None if trace.is_literal(atom) else made.get(atom)


def _number(atom: Any, made: Mapping[Any, Any]) -> _Number | None:
    if trace.is_literal(atom):
        return _Number({}, int(atom.val)) if getattr(atom.aval, "shape", None) == () else None
    equation = made.get(atom)
    if equation is None:
        return None
    name = equation.primitive.name
    if name == "axis_index":
        return _Number({str(equation.params["axis_name"]): 1}, 0)
    if name in _SAME:
        return _number(equation.invars[0], made)
    if name not in ("add", "mul"):
        return None
    a, b = (_number(v, made) for v in equation.invars)
    if a is None or b is None:
        return None
    if name == "add":
        axes = {**a.times, **b.times}
        times = {axis: a.times.get(axis, 0) + b.times.get(axis, 0) for axis in axes}
        return _Number(times, a.constant + b.constant)
    if a.times and b.times:
        return None
    factor, other = (b.constant, a) if a.times else (a.constant, b)
    return _Number({k: n * factor for k, n in other.times.items()}, other.constant * factor)


def _solved(sides: list[_Number | None]) -> dict[str, int]:
    """The places along the axes of one side that make it equal to the other, a constant."""
    if None in sides:
        return {}
    a, b = (side for side in sides if side is not None)
    own, other = (a, b) if a.times else (b, a)
    if other.times or min(own.times.values(), default=0) < 1:
        return {}
    left, places = other.constant - own.constant, {}
    for axis, times in sorted(own.times.items(), key=lambda item: -item[1]):
        places[axis], left = divmod(left, times)
    return places if left == 0 and min(places.values()) >= 0 else {}
