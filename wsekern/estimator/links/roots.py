"""Where a flood starts, if the trace says so: on the PE whose number it compares with.

`fabric.broadcast` keeps the root's tile by a comparison, and zeros elsewhere. Of a root that a
loop's counter decides, as in SUMMA, the trace says nothing here: the loop's floods start on one PE
after another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.estimator import trace

# Operations whose result is the same number as their operand.
_SAME = frozenset({"pvary", "pcast", "convert_element_type", "copy"})
_Producers = Mapping[Any, JaxprEqn]  # the equation that makes each variable


class _LinearForm(NamedTuple):
    """A number that each PE has: a sum of its places, each times a factor, and a constant.

    Of PEs on a grid of 5 columns, numbered row by row, it is {"y": 5, "x": 1} + 0.
    """

    times: dict[str, int]
    constant: int


def find_flood_roots(jaxpr: Jaxpr) -> dict[int, dict[str, int]]:
    """The root's place along each axis, by the id of the equation that floods.

    `fabric.broadcast(a, ("y", "x"), root=7)` on 5 columns has the equations

      c = 5 * axis_index y + axis_index x
      d = where(c == 7, a, 0)
      flood d                                  and starts at {"y": 1, "x": 2}
    """
    # A gradient leaves floods without operands behind in its trace, which send nothing.
    floods = [e for e in jaxpr.eqns if e.params.get("name") == "flood" and e.invars]
    if not floods:
        return {}
    producers: dict[Any, JaxprEqn] = {v: e for e in jaxpr.eqns for v in e.outvars}
    roots = {}
    for equation in floods:
        choice = _producer(equation.invars[0], producers)
        if choice is None or not (
            choice.primitive.name == "select_n" or choice.params.get("name") == "_where"
        ):
            continue
        comparison = _producer(choice.invars[0], producers)
        if comparison is not None and comparison.primitive.name == "eq":
            places = _solve([_linear_form(v, producers) for v in comparison.invars])
            if places:
                roots[id(equation)] = places
    return roots


def _producer(atom: Any, producers: _Producers) -> JaxprEqn | None:
    return None if trace.is_literal(atom) else producers.get(atom)


def _linear_form(atom: Any, producers: _Producers) -> _LinearForm | None:
    if trace.is_literal(atom):
        scalar = getattr(atom.aval, "shape", None) == ()
        return _LinearForm({}, int(atom.val)) if scalar else None
    equation = producers.get(atom)
    if equation is None:
        return None
    name = equation.primitive.name
    if name == "axis_index":
        return _LinearForm({str(equation.params["axis_name"]): 1}, 0)
    if name in _SAME:
        return _linear_form(equation.invars[0], producers)
    if name not in ("add", "mul"):
        return None
    a, b = (_linear_form(v, producers) for v in equation.invars)
    if a is None or b is None:
        return None
    if name == "add":
        axes = {**a.times, **b.times}
        times = {axis: a.times.get(axis, 0) + b.times.get(axis, 0) for axis in axes}
        return _LinearForm(times, a.constant + b.constant)
    if a.times and b.times:
        return None  # a product of places is not linear
    factor, other = (b.constant, a) if a.times else (a.constant, b)
    return _LinearForm({k: n * factor for k, n in other.times.items()}, other.constant * factor)


def _solve(sides: list[_LinearForm | None]) -> dict[str, int]:
    """The places at which one side equals the other, which is a constant; {} if none do.

    5 y + x == 7: the largest factor first, 7 = 5 * 1 + 2, so that y = 1; what is left, x = 2.
    """
    if None in sides:
        return {}
    a, b = (side for side in sides if side is not None)
    form, number = (a, b) if a.times else (b, a)
    if number.times or min(form.times.values(), default=0) < 1:
        return {}
    left, places = number.constant - form.constant, {}
    for axis, times in sorted(form.times.items(), key=lambda item: -item[1]):
        places[axis], left = divmod(left, times)
    return places if left == 0 and min(places.values()) >= 0 else {}
