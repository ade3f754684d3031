"""This file is what a solver gives back, and how it decides that it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator

# Why a solver stopped, by number, as an array inside jit can hold it.
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


class Solution(NamedTuple):
    """The result of a solver; a pytree, so that it may leave a jit."""

    x: Fields
    iterations: jax.Array  # int32
    residuals: jax.Array  # norms of b - A x as the method has them, one an iteration; NaN beyond
    residual: jax.Array  # the norm of b - A x, computed anew at the end
    converged: jax.Array  # bool, judged by `residual`
    reason: jax.Array  # int32, a place in `REASONS`

    @property
    def why(self) -> str:
        """Why it stopped, in words; outside jit."""
        return REASONS[int(self.reason)]


class State(NamedTuple):
    """A solver under way; `rest` is what its method carries beside."""

    x: Fields
    r: Fields
    rest: Any
    k: jax.Array
    residuals: jax.Array
    checked: jax.Array  # the true residual's norm when it was last computed
    reason: jax.Array  # -1 while it goes on


def solve(
    what: str,
    operator: Operator,
    b: Fields,
    x0: Fields | None,
    begin: Callable[[Fields], Any],
    step: Callable[[Operator, Fields, Fields, Any], tuple[Fields, Fields, Any, jax.Array]],
    *,
    tolerance: float,
    absolute: float,
    max_iterations: int,
    symmetric: bool,
) -> Solution:
    """`x` with `operator(x) = b`, by a method's `begin` and `step`, differentiable in all it reads.

    The derivative solves with the operator again, or with its transpose: no iteration is kept.

    Args:
      what: the method's name.
      operator: linear.
      b: the right side.
      x0: where to begin; None is at zero.
      begin: what the method carries, of a residual.
      step: one iteration, of the operator or its transpose: new x, residual and rest, and why it
        cannot go on, a place in `REASONS`, or -1.
      tolerance: of the residual's norm, beside b's.
      absolute: of the residual's norm.
      max_iterations: at most.
      symmetric: whether the transpose is the operator itself.
    """
    fields.check(what, operator, b, x0)
    if max_iterations < 1 or tolerance < 0 or absolute < 0:
        raise ValueError(
            f"{what}: max_iterations={max_iterations} must be 1 or more, tolerance={tolerance} and "
            f"absolute={absolute} 0 or more"
        )

    r0, share = b, jnp.float32(tolerance)
    if x0 is not None:
        r0 = fields.minus(b, operator(x0))
        # Told beside `b`, of which `x0` may have left little or nothing.
        left = lax.stop_gradient(fields.norm(r0))
        share = tolerance * lax.stop_gradient(fields.norm(b)) / jnp.where(left == 0, 1, left)

    def run(matvec, b):
        target = jnp.maximum(share * fields.norm(b), absolute)
        state = _iterate(matvec, b, begin, step, target, max_iterations)
        return state.x, _told(state, matvec, b, target)

    x, told = lax.custom_linear_solve(operator, r0, run, run, symmetric=symmetric, has_aux=True)
    return Solution(x if x0 is None else fields.plus(x0, 1, x), *told)


def _iterate(matvec, b, begin, step, target, most) -> State:
    x, r, size = jax.tree.map(jnp.zeros_like, b), b, fields.norm(b)
    residuals = jnp.full(most + 1, jnp.nan, size.dtype).at[0].set(size)
    done = jnp.where(size <= target, CONVERGED, jnp.where(jnp.isfinite(size), -1, NOT_FINITE))
    first = State(x, r, begin(r), jnp.int32(0), residuals, size, done.astype(jnp.int32))

    def body(s: State) -> State:
        x, r, rest, why = step(matvec, s.x, s.r, s.rest)
        k, size = s.k + 1, fields.norm(r)
        near = size <= target

        def looked_at():
            """The residual as it is, for what the method carries on may have drifted away."""
            true = fields.minus(b, matvec(x))
            return true, begin(true), fields.norm(true)

        r, rest, true = lax.cond(near, looked_at, lambda: (r, rest, s.checked))
        reason = jnp.where(k >= most, OUT_OF_ITERATIONS, -1)
        reason = jnp.where(near & (true > target) & (2 * true > s.checked), STAGNATED, reason)
        reason = jnp.where(why >= 0, why, reason)
        reason = jnp.where(jnp.isfinite(size), reason, NOT_FINITE)
        reason = jnp.where(near & (true <= target), CONVERGED, reason)
        residuals = s.residuals.at[k].set(jnp.where(near, true, size))
        return State(x, r, rest, k, residuals, true, reason.astype(jnp.int32))

    return lax.while_loop(lambda s: s.reason < 0, body, first)


def _told(s: State, matvec: Operator, b: Fields, target: jax.Array) -> tuple:
    """What is said of a solution, by its true residual."""
    r = fields.minus(b, matvec(s.x))
    size = fields.norm(r)
    converged = size <= target
    # What is left of a system that has a solution is rounding.
    rounded = size <= jnp.sqrt(jnp.finfo(size.dtype).eps) * fields.norm(b)
    failed = jnp.where((s.reason == INCONSISTENT) & rounded, STAGNATED, s.reason)
    failed = jnp.where(failed == CONVERGED, STAGNATED, failed)
    reason = jnp.where(converged, CONVERGED, failed).astype(jnp.int32)
    return s.k, s.residuals, size, converged, reason
