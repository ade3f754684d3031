"""This file is what is computed once on CPUs, not again in each expression that reads it.

XLA's CPU backend fuses an array's arithmetic into all that reads it. Read at several places, as by
a stencil of a stencil, it is computed at each of them. And of an array that is cut and then written
in place, it makes a copy where it fuses cut and write. Nothing is fused into the branches of a
condition, nor out of them, so what shall be apart is put into one.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

# What it costs to write an array and to read it, in operations a cell: less is computed again.
_PASS = 10
_COSTS = {"div": 4, "sqrt": 4, "rsqrt": 4, "rem": 4} | dict.fromkeys(
    ("exp", "expm1", "log", "log1p", "pow", "sin", "cos", "tanh", "logistic", "erf", "cbrt"), 10
)
_MOVES = {"slice", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"}

Place = tuple[Any, tuple[int, ...]]  # a pass over cells, and how far from its own a cell is read


def apart(
    function: Callable[..., list[jax.Array]], step: Any, *operands: jax.Array
) -> list[jax.Array]:
    """`function(*operands)`, computed before whatever reads it.

    Args:
      function: of arrays, to arrays.
      step: a loop's whole number, unknown to the compiler; with a known one nothing is apart.
      operands: of the function.
    """
    if not isinstance(step, jax.Array):
        return function(*operands)

    def never(*operands):
        return [-made for made in function(*operands)]

    # No square is two more than a multiple of four, but that is more than XLA can tell.
    return lax.cond((step * step) & 3 == 2, never, function, *operands)


def sparing(
    function: Callable[..., Sequence[jax.Array]], step: Any, *operands: jax.Array
) -> list[jax.Array]:
    """`function(*operands)`, of which arrays that are read at several places are computed apart.

    Which are worth it is told by its arithmetic and its slices, whatever the arrays' sizes are.
    `step` is as in `apart`.
    """
    if not isinstance(step, jax.Array):
        return list(function(*operands))
    closed = jax.make_jaxpr(function)(*operands)
    jaxpr = closed.jaxpr
    if jaxpr.effects:  # what is printed is read by nothing, and shall be printed all the same
        return list(function(*operands))
    known, values = [*jaxpr.invars], [*operands]
    for level in _levels(jaxpr, _chosen(jaxpr)):
        values += apart(_themselves, step, *_part(closed, known, level)(*values))
        known += level
    return _part(closed, known, jaxpr.outvars)(*values)


def _themselves(*arrays):
    return list(arrays)


def _chosen(jaxpr: Any) -> set[Any]:
    """The variables to be computed apart."""
    chosen: set[Any] = set()
    for _ in range(2):  # what an expression costs depends on what of it is computed apart
        chosen = _worth_it(jaxpr, _costs(jaxpr, chosen))
    return chosen


def _costs(jaxpr: Any, chosen: Collection[Any]) -> dict[Any, int]:
    """Operations a cell of each variable's expression, which ends at the chosen ones."""
    within: dict[Any, frozenset[int]] = {}
    own = [_cost(equation) for equation in jaxpr.eqns]
    for i, equation in enumerate(jaxpr.eqns):
        read = [within.get(v, frozenset()) for v in _variables(equation.invars) if v not in chosen]
        within |= dict.fromkeys(equation.outvars, frozenset([i]).union(*read))
    return {variable: sum(own[i] for i in of_it) for variable, of_it in within.items()}


def _cost(equation: Any) -> int:
    name = equation.primitive.name
    if name in _MOVES:
        return 0
    if name == "integer_pow":
        return abs(equation.params["y"]) - 1
    if name == "jit":
        return sum(map(_cost, equation.params["jaxpr"].eqns))
    return _COSTS.get(name, 1)


def _worth_it(jaxpr: Any, costs: dict[Any, int]) -> set[Any]:
    """The variables that cost less if computed apart."""
    chosen = set()
    smallest = min(math.prod(v.aval.shape) for v in jaxpr.outvars) / 2  # not a row or a number
    places: dict[Any, set[Place]] = {v: set() for e in jaxpr.eqns for v in e.outvars}
    for i, v in enumerate(jaxpr.outvars):
        places.setdefault(v, set()).add((i, (0,) * v.aval.ndim))
    for i, equation in reversed([*enumerate(jaxpr.eqns)]):
        made = equation.outvars[0]
        read = set().union(*(places[v] for v in equation.outvars))
        again = (len(read) - 1) * costs[made]
        alone = len(equation.outvars) == 1 and jnp.issubdtype(made.aval.dtype, jnp.number)
        if again > _PASS and alone and made.aval.size > smallest:
            chosen.add(made)
            read = {(made, (0,) * made.aval.ndim)}
        for v in _variables(equation.invars):
            places.setdefault(v, set()).update(_read(equation, f"into {i}", v, read))
    return chosen


def _read(equation: Any, name: str, variable: Any, places: set[Place]) -> set[Place]:
    """Where `variable` is read, of an equation whose result is read at `places`."""
    if equation.primitive.name == "slice" and set(equation.params["strides"] or [1]) == {1}:
        start = equation.params["start_indices"]
        return {(i, tuple(map(sum, zip(start, at, strict=True)))) for i, at in places}
    if variable.aval.shape == equation.outvars[0].aval.shape:
        return places
    return {(name, (0,) * variable.aval.ndim)} if places else set()  # by a pass of its own


def _levels(jaxpr: Any, chosen: Collection[Any]) -> list[list[Any]]:
    """The chosen variables, those first that need no others."""
    depth: dict[Any, int] = {}
    levels: list[list[Any]] = []
    for equation in jaxpr.eqns:
        below = max((depth.get(v, 0) for v in _variables(equation.invars)), default=0)
        for made in equation.outvars:
            depth[made] = below + (made in chosen)
            if made in chosen:
                levels += [[]] * (below == len(levels))
                levels[below] = [*levels[below], made]
    return levels


def _part(closed: Any, known: Sequence[Any], wanted: Sequence[Any]) -> Callable[..., list]:
    """The function from variables that are known to those that are wanted."""
    jaxpr, needed = closed.jaxpr, []
    missing = {*_variables(wanted)} - {*known}
    for equation in reversed(jaxpr.eqns):
        if missing & {*equation.outvars}:
            needed.append(equation)
            missing |= {*_variables(equation.invars)} - {*known}
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    part = jaxpr.replace(invars=[*known], outvars=[*wanted], eqns=needed[::-1], debug_info=names)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, closed.consts))


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not hasattr(atom, "val")]
