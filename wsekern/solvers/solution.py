"""The loop that every solver runs, its result, and how it decides that it is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator, Power, Scalar
from wsekern.wafer.keywords import Requirement

# Why a solver stopped. Inside jit the reason is a number, a place in this list.
REASONS = (
    "converged",
    "the most iterations were taken",
    "stagnated: the true residual falls no further in this precision",
    "breakdown: the operator is not what the method needs (indefinite, or not symmetric)",
    "inconsistent: the operator is singular, and b has a part that it cannot make",
    "not finite",
    "diverged: the residual grows; multigrid's operators must have their walls at one place",
)
CONVERGED, OUT_OF_ITERATIONS, STAGNATED, BREAKDOWN, INCONSISTENT, NOT_FINITE, DIVERGED = range(
    len(REASONS)
)
TOLERANCE, ABSOLUTE = 1e-5, 0.0  # defaults of every method
GOES_ON = -1  # instead of a reason
# The limits' names in `jax.scipy.sparse.linalg`, and ours.
JAX_NAMES = {"tol": "tolerance", "atol": "absolute", "maxiter": "max_iterations"}


def _is_number(value: Any) -> bool:
    """Whether `value` is one real number, of Python, NumPy or JAX."""
    is_other = isinstance(value, bool | str | bytes)
    return not is_other and jnp.isscalar(value) and jnp.isrealobj(value)


_NOT_NEGATIVE = Requirement(lambda value: _is_number(value) and value >= 0, "0 or more, a number")
_COUNT = Requirement(
    lambda value: _is_number(value) and value >= 1 and value == value // 1,
    "1 or more, a whole number",
)
# What every method's limits must be, and a preconditioner where there is one.
REQUIREMENTS = {
    "tolerance": _NOT_NEGATIVE,
    "absolute": _NOT_NEGATIVE,
    "max_iterations": _COUNT,
    "preconditioner": Requirement(callable, "a function of fields"),
}

Reason = Int[Array, ""]
Begin = Callable[[Fields], Any]
Step = Callable[[Operator, Fields, Fields, Any], tuple[Fields, Fields, Any, Reason]]


class Solution(NamedTuple):
    """The result of a solver; a pytree, so that it may leave a jit."""

    x: Fields  # NaN where b, or b - A x0, holds NaN or an infinity
    iterations: jax.Array  # int32
    residuals: jax.Array  # norms of b - A x as the method has them, one an iteration; NaN beyond
    residual: jax.Array  # the norm of b - A x, computed anew at the end
    converged: jax.Array  # bool, judged by `residual`
    reason: jax.Array  # int32, a place in `REASONS`

    @property
    def why(self) -> str:
        """Why it stopped, in words; outside jit."""
        return REASONS[int(self.reason)]


class Limits(NamedTuple):
    """When a solver stops."""

    tolerance: float
    absolute: float
    max_iterations: int


def solve(
    method: str,
    operator: Operator,
    b: Fields,
    x0: Fields | None,
    begin: Begin,
    step: Step,
    limits: Limits,
    *,
    symmetric: bool,
) -> Solution:
    """`x` with `operator(x) = b`, differentiable with respect to `b` and what `operator` reads.

    The derivative is another solve, with the operator or its transpose: no iteration is kept.

    The system is solved for b times a power of two, so that no norm over- or underflows; the same
    holds for a derivative's right side. Tolerances and results are in the caller's units.

    Args:
      method: its name, for messages.
      operator: linear.
      b: the right side.
      x0: where to begin; None is at zero.
      begin: what the method carries at first, from a residual.
      step: one iteration, from the operator or its transpose, x, the residual and what the method
        carries: the new ones, and why it cannot go on, a place in `REASONS`, or -1.
      limits: when it stops.
      symmetric: whether the transpose is the operator itself.
    """
    fields.check(method, operator, b, x0)
    b = jax.tree.map(jnp.asarray, b)
    if x0 is None:
        right: _System = b, None
    else:
        # What is solved for is the correction of x0, whose right side may be far smaller than b.
        size = lax.stop_gradient(fields.mean_size(b))
        right = fields.minus(b, operator(x0)), jnp.stack([jnp.ones_like(size), size])

    def run(matvec: Callable[[_System], _System], right: _System) -> tuple[_System, tuple]:
        b, reference = right
        x, results = _solve_scaled(
            lambda x: matvec((x, reference))[0], b, reference, begin, step, limits
        )
        return (x, reference), results

    matvec = lambda x: (operator(x[0]), x[1])  # noqa: E731

    # Jitted: a loop outside jit does not learn from fields on Explicit axes where it has to run.
    @jax.jit
    def solve_for(right: _System) -> tuple[_System, tuple]:
        return lax.custom_linear_solve(matvec, right, run, run, symmetric=symmetric, has_aux=True)

    (x, _), results = solve_for(_instantiate_tangents(right))
    if x0 is not None:
        x = fields.plus(x0, 1, x)
    return Solution(x, *results)


# A right side or a solution. Where x0 is given also `[1, root mean square of b]`, to which the
# tolerance is relative; of a derivative's right side these are zeros.
_System = tuple[Fields, Float[Array, "2"] | None]


@jax.custom_jvp
def _instantiate_tangents(right: _System) -> _System:
    """`right`; if any part of it has a tangent, all parts have one.

    `custom_linear_solve` fails on parts without one, in jax 0.10 to 0.12.
    """
    return right


@_instantiate_tangents.defjvp
def _instantiate_tangents_jvp(
    primals: tuple[_System], tangents: tuple[_System]
) -> tuple[_System, _System]:
    # Zeros by themselves would be no tangent again: these are computed from the others.
    zero = sum(jnp.sum(0 * leaf).astype(jnp.float32) for leaf in jax.tree.leaves(tangents[0]))
    return primals[0], jax.tree.map(lambda t: t + jnp.asarray(zero, t.dtype), tangents[0])


def _solve_scaled(
    matvec: Operator,
    b: Fields,
    reference: Float[Array, "2"] | None,
    begin: Begin,
    step: Step,
    limits: Limits,
) -> tuple[Fields, tuple[Any, ...]]:
    """x, and the other fields of a solution, of b times a power of two.

    b's largest number would be between 1/2 and 1. But an operator of 1e36 then makes an x of 1e-36,
    whose smaller parts float32 loses: so b and x get halves of the operator's size.
    """
    power = fields.exponent(b)
    power = power - _half_exponent(matvec, fields.times_power(b, -power))
    scaled = fields.times_power(b, -power)
    size = fields.norm(scaled)
    relative = size
    if reference is not None:
        of_b = fields.times_power(reference[1], -power) * math.sqrt(fields.cells(b))
        relative = jnp.where(reference[0] == 0, size, of_b)
    # Without a tolerance not even an infinite size is small enough.
    relative = limits.tolerance * relative if limits.tolerance else jnp.zeros_like(size)
    absolute = fields.times_power(jnp.asarray(limits.absolute, size.dtype), -power)
    target = jnp.maximum(relative, absolute)
    state = _iterate(matvec, scaled, begin, step, target, limits.max_iterations)
    # Zeros would look like a solution, and a gradient cannot say that it is none.
    known = jnp.isfinite(size)
    x = jax.tree.map(lambda x: jnp.where(known, x, jnp.nan), fields.times_power(state.x, power))
    return x, _judge(state, matvec, b, x, power, target)


def _half_exponent(matvec: Operator, unit: Fields) -> Power:
    """Half the power of two by which `matvec` makes `unit` larger, as far as squares have room."""
    # A third of the range, squared, leaves a third for sums.
    most = min(int(jnp.finfo(leaf.dtype).maxexp) for leaf in jax.tree.leaves(unit)) // 3
    return jnp.clip(fields.exponent(matvec(unit)) // 2, -most, most)


class _LoopState(NamedTuple):
    x: Fields
    r: Fields
    carry: Any  # what the method carries besides
    k: Int[Array, ""]
    residuals: Float[Array, " iterations"]
    true_residual: Scalar  # when it was last computed
    reason: Reason


def _iterate(
    matvec: Operator, b: Fields, begin: Begin, step: Step, target: Scalar, most: int
) -> _LoopState:
    x, r, size = jax.tree.map(jnp.zeros_like, b), b, fields.norm(b)
    # A loop has no history of unknown length: room for all iterations, NaN where none was taken.
    residuals = jnp.full(most + 1, jnp.nan, size.dtype).at[0].set(size)
    # Finite before small: a target may be infinite too.
    reason = jnp.where(size <= target, CONVERGED, GOES_ON)
    reason = jnp.where(jnp.isfinite(size), reason, NOT_FINITE).astype(jnp.int32)
    first = _LoopState(x, r, begin(r), jnp.int32(0), residuals, size, reason)

    def body(s: _LoopState) -> _LoopState:
        x, r, carry, why = step(matvec, s.x, s.r, s.carry)
        k, size = s.k + 1, fields.norm(r)
        near = size <= target

        # The residual that a method carries drifts away from b - A x. So before it counts as small
        # enough, the true one is computed, and the method begins anew from it.
        def begin_anew() -> tuple[Fields, Any, Scalar]:
            true = fields.minus(b, matvec(x))
            return true, begin(true), fields.norm(true)

        r, carry, true = lax.cond(near, begin_anew, lambda: (r, carry, s.true_residual))
        # The last one that applies wins.
        reason = jnp.where(k >= most, OUT_OF_ITERATIONS, GOES_ON)
        not_halved = 2 * true > s.true_residual
        reason = jnp.where(near & (true > target) & not_halved, STAGNATED, reason)
        reason = jnp.where(why >= 0, why, reason)
        reason = jnp.where(jnp.isfinite(size), reason, NOT_FINITE)
        reason = jnp.where(near & (true <= target), CONVERGED, reason)
        residuals = s.residuals.at[k].set(jnp.where(near, true, size))
        return _LoopState(x, r, carry, k, residuals, true, reason.astype(jnp.int32))

    return lax.while_loop(lambda s: s.reason < 0, body, first)


def _judge(
    s: _LoopState, matvec: Operator, b: Fields, x: Fields, power: Power, target: Scalar
) -> tuple[Int[Array, ""], Float[Array, " iterations"], Scalar, Bool[Array, ""], Reason]:
    """The fields of a solution other than x, by the true residual of x.

    Args:
      s: the end of the loop, for b times 2**-power.
      matvec: the operator or its transpose.
      b: the right side in the caller's units, as x.
      x: what is judged. Where its units are beyond its dtype, it is not what the loop found.
      power: of two.
      target: of the residual, for b times 2**-power.
    """
    # Computed anew: the loop's last residual may have drifted.
    r = fields.times_power(fields.minus(b, matvec(x)), -power)
    size = fields.norm(r)
    converged = jnp.isfinite(size) & (size <= target)
    # A singular system with a solution: what is left of the residual is rounding.
    rounding = size <= jnp.sqrt(jnp.finfo(size.dtype).eps) * s.residuals[0]
    reason = jnp.where((s.reason == INCONSISTENT) & rounding, STAGNATED, s.reason)
    # Whoever said converged is overruled by the true residual.
    reason = jnp.where(reason == CONVERGED, STAGNATED, reason)
    reason = jnp.where(jnp.isfinite(size), reason, NOT_FINITE)
    reason = jnp.where(converged, CONVERGED, reason).astype(jnp.int32)
    residuals, size = fields.times_power((s.residuals, size), power)
    return s.k, residuals, size, converged, reason
