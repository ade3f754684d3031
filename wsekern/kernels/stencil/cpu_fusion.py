"""Keep XLA's CPU backend from recomputing a shared subexpression at every use.

This workaround is for XLA's CPU backend only; other backends never come here. That backend fuses an
array's arithmetic into everything that reads it:

- An array that is read at several places, as the flux in a stencil of a stencil is, is computed
  again at each of them.
- Of an array that is cut and then written in place, it makes a copy when it fuses cut and write.

XLA fuses nothing into the branches of a `cond`, nor out of them. So a branch is a fusion barrier:
what has to be computed once goes into one.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jaxtyping import Array, Int

from wsekern.kernels.stencil.buffers import Step, Tile

# To write an array and read it again costs as much as this many operations a cell. What costs less
# is computed again.
_PASS = 10
_COSTS = {"div": 4, "sqrt": 4, "rsqrt": 4, "rem": 4} | dict.fromkeys(
    ("exp", "expm1", "log", "log1p", "pow", "sin", "cos", "tanh", "logistic", "erf", "cbrt"), 10
)
_MOVES = {"slice", "broadcast_in_dim", "reshape", "squeeze", "convert_element_type", "copy"}

Variable = Any  # a `core.Var`, whose `aval` JAX types as one without a shape
Equation = core.JaxprEqn
# A pass over cells (its number, or the variable or equation that it computes), and the offset from
# its own cell at which it reads another one.
Read = tuple[Any, tuple[int, ...]]


def compute_once(
    function: Callable[..., Sequence[Tile]],
    counter: Step | None,
    *operands: Tile,
    results_too: bool = False,
) -> list[Tile]:
    """`function(*operands)` with its shared subexpressions computed once; for XLA's CPU backend.

    Which subexpressions are worth it follows from the jaxpr's arithmetic and slices, not from the
    sizes of arrays. A function with effects, such as `jax.debug.print`, is left as it is.

    Args:
      function: of arrays, to arrays.
      counter: the number of a loop's step, a value that XLA does not know. With a number that it
        knows, or None, this is just `function(*operands)`.
      operands: of the function.
      results_too: True computes the results once, before anything that reads them, and leaves
        subexpressions alone.
    """
    if not isinstance(counter, jax.Array):
        return list(function(*operands))
    if results_too:
        return _behind_barrier(function, counter, *operands)
    closed = jax.make_jaxpr(function)(*operands)
    jaxpr = closed.jaxpr
    if jaxpr.effects:  # a part below has only what its results need: prints would be lost
        return list(function(*operands))
    known, values = [*jaxpr.invars], [*operands]
    for level in shared_levels(jaxpr):
        compute = _part(closed, known, level)
        values += _behind_barrier(lambda *arrays: [*arrays], counter, *compute(*values))
        known += level
    return _part(closed, known, jaxpr.outvars)(*values)


def shared_levels(jaxpr: core.Jaxpr) -> list[list[Variable]]:
    """The variables that are worth computing once; each level needs only those before it.

    For `a = exp(u)`, `b = sqrt(a[1:] + a[:-1])`, `c = b[1:] + b[:-1]`, each costly and read twice:
    `[[a], [b]]`; `c`, the result, is read once.
    """
    chosen: set[Variable] = set()
    for _ in range(2):  # an expression costs less once a part of it is chosen
        chosen = _worth_storing(jaxpr, _costs(jaxpr, chosen))
    depth: dict[Variable, int] = {}
    levels: list[list[Variable]] = []
    for equation in jaxpr.eqns:
        below = max((depth.get(v, 0) for v in _variables(equation.invars)), default=0)
        for result in equation.outvars:
            depth[result] = below + (result in chosen)
            if result in chosen:
                levels += [[]] * (below == len(levels))
                levels[below] = [*levels[below], result]
    return levels


def _behind_barrier(
    function: Callable[..., Sequence[Tile]], counter: Int[Array, ""], *operands: Tile
) -> list[Tile]:
    """`function(*operands)` in a branch, computed before anything that reads it."""

    def never(*operands: Tile) -> list[Tile]:
        # Unlike the other branch, or XLA would merge the two and drop the condition.
        return [-result for result in function(*operands)]

    # `counter**2 % 4 == 2` is never true, but XLA cannot prove it, so it keeps the branch.
    return lax.cond((counter * counter) & 3 == 2, never, lambda *o: list(function(*o)), *operands)


def _costs(jaxpr: core.Jaxpr, chosen: Collection[Variable]) -> dict[Variable, int]:
    """Operations a cell of each variable's expression, down to operands and chosen variables."""
    # The equations of each variable's expression, as a set: one that is used twice counts once.
    expressions: dict[Variable, frozenset[int]] = {}
    costs = [_cost(equation) for equation in jaxpr.eqns]
    for i, equation in enumerate(jaxpr.eqns):
        read = [
            expressions.get(v, frozenset()) for v in _variables(equation.invars) if v not in chosen
        ]
        expressions |= dict.fromkeys(equation.outvars, frozenset([i]).union(*read))
    return {variable: sum(costs[i] for i in used) for variable, used in expressions.items()}


def _cost(equation: Equation) -> int:
    name = equation.primitive.name
    if name in _MOVES:
        return 0
    if name == "integer_pow":
        return abs(equation.params["y"]) - 1
    if name == "jit":
        return sum(map(_cost, equation.params["jaxpr"].eqns))
    return _COSTS.get(name, 1)


def _worth_storing(jaxpr: core.Jaxpr, costs: dict[Variable, int]) -> set[Variable]:
    """The variables that cost less if they are computed once and stored."""
    chosen = set()
    results: list[Variable] = [*jaxpr.outvars]
    smallest = min(math.prod(v.aval.shape) for v in results) / 2  # not a row or a number
    reads: dict[Variable, set[Read]] = {v: set() for e in jaxpr.eqns for v in e.outvars}
    for i, v in enumerate(results):
        reads.setdefault(v, set()).add((i, (0,) * v.aval.ndim))
    # From the results back: by then it is known at which offsets each variable is read.
    for i, equation in reversed([*enumerate(jaxpr.eqns)]):
        result: Variable = equation.outvars[0]
        read_at = set().union(*(reads[v] for v in equation.outvars))
        # XLA computes the expression once for each offset at which some pass reads it.
        saved = (len(read_at) - 1) * costs[result]
        # A mask cannot be negated, as the barrier's other branch does.
        number = len(equation.outvars) == 1 and jnp.issubdtype(result.aval.dtype, jnp.number)
        if saved > _PASS and number and result.aval.size > smallest:
            chosen.add(result)
            read_at = {(result, (0,) * result.aval.ndim)}  # from now on a pass of its own
        for v in _variables(equation.invars):
            reads.setdefault(v, set()).update(_operand_reads(equation, f"into {i}", v, read_at))
    return chosen


def _operand_reads(equation: Equation, name: str, operand: Variable, reads: set[Read]) -> set[Read]:
    """Where `operand` is read, if the equation's result is read at `reads`.

    In `u[2:] - u[:-2]`, read at offset 0, `u` is read at offsets 2 and 0.
    """
    if equation.primitive.name == "slice" and set(equation.params["strides"] or [1]) == {1}:
        start = equation.params["start_indices"]
        return {(i, tuple(map(sum, zip(start, at, strict=True)))) for i, at in reads}
    result: Variable = equation.outvars[0]
    if operand.aval.shape == result.aval.shape:
        return reads
    # A reduction, a broadcast, a transpose: taken for one pass that reads all of the operand.
    return {(name, (0,) * operand.aval.ndim)} if reads else set()


def _part(
    closed: core.ClosedJaxpr, known: Sequence[Variable], wanted: Sequence[Variable]
) -> Callable[..., list[Tile]]:
    """The function from the variables `known` to the variables `wanted`."""
    jaxpr, needed = closed.jaxpr, []
    missing = {*_variables(wanted)} - {*known}
    for equation in reversed(jaxpr.eqns):
        if missing & {*equation.outvars}:
            needed.append(equation)
            missing |= {*_variables(equation.invars)} - {*known}
    names = jaxpr.debug_info._replace(arg_names=None, result_paths=None)
    part = jaxpr.replace(invars=[*known], outvars=[*wanted], eqns=needed[::-1], debug_info=names)
    return core.jaxpr_as_fun(core.ClosedJaxpr(part, closed.consts))


def _variables(atoms: Iterable[Any]) -> list[Variable]:
    return [atom for atom in atoms if not hasattr(atom, "val")]  # a literal has a value
