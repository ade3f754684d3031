"""The loop that every solver runs, its result, and how it decides that it is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern.solvers import batched, fields
from wsekern.solvers.fields import Fields, Operator, Power, Scalar
from wsekern.wafer import on_devices
from wsekern.wafer.keywords import Requirement

# Why a solver stopped. Inside jit the reason is a number, a place in this list.
REASONS = (
    "converged",
    "the most iterations were taken",
    "stagnated: the true residual falls no further in this precision",
    "breakdown: the operator is not what the method needs (indefinite, or not symmetric)",
    "inconsistent: the operator is singular, and b has a part that it cannot make",
    "not finite",
    "diverged: the residual grows (multigrid needs operators with their walls at one place)",
)
CONVERGED, OUT_OF_ITERATIONS, STAGNATED, BREAKDOWN, INCONSISTENT, NOT_FINITE, DIVERGED = range(
    len(REASONS)
)
TOLERANCE, ABSOLUTE = 1e-5, 0.0  # defaults of every method
GOES_ON = -1  # instead of a reason
_ROUNDING = 4  # times a dtype's epsilon: where a method's own residual may be rounding alone
# The limits' names in `jax.scipy.sparse.linalg`, and ours.
JAX_NAMES = {"tol": "tolerance", "atol": "absolute", "maxiter": "max_iterations"}


def is_positive(value: Any) -> bool:
    """Whether `value` is a number above 0, as far as that is known: a traced one may be."""
    return _is_number(value) and (not _is_known(value) or bool(0 < value < math.inf))


def _is_number(value: Any) -> bool:
    """Whether `value` is one real number, of Python, NumPy or JAX."""
    is_other = isinstance(value, bool | str | bytes)
    return not is_other and jnp.isscalar(value) and jnp.isrealobj(value)


def _is_known(value: Any) -> bool:
    return not isinstance(value, jax.core.Tracer)


_NOT_NEGATIVE = Requirement(
    # A traced value cannot be looked at. No residual is as small as one below 0, or as NaN.
    lambda value: _is_number(value) and (not _is_known(value) or value >= 0),
    "0 or more, a number",
)
_COUNT = Requirement(
    lambda value: _is_number(value) and _is_known(value) and value >= 1 and value == value // 1,
    "1 or more, a whole number that is not traced",
)
# What every method's limits must be, and a preconditioner where there is one.
REQUIREMENTS = {
    "tolerance": _NOT_NEGATIVE,
    "absolute": _NOT_NEGATIVE,
    "max_iterations": _COUNT,
    "preconditioner": Requirement(callable, "a function of fields"),
}

Reason = Int[Array, ""]


class System(NamedTuple):
    """What a step may apply: functions whose results are about as large as what they are given.

    They are the caller's, times powers of two.
    """

    operator: Operator  # or its transpose
    preconditioner: Operator


Begin = Callable[[System, Fields], Any]
Step = Callable[[System, Fields, Fields, Any], tuple[Fields, Fields, Any, Reason]]


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

    tolerance: float | Scalar
    absolute: float | Scalar
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
    preconditioner: Operator | None = None,
    is_inverse: bool = False,
) -> Solution:
    """`x` with `operator(x) = b`, differentiable with respect to `b` and what `operator` reads.

    The derivative is another solve, with the operator or its transpose: no iteration is kept.

    The system is solved in units in which b and the operator are about 1, powers of two away from
    the caller's, so that nothing over- or underflows; the same holds for a derivative's right side.
    Tolerances and results are in the caller's units.

    Args:
      method: its name, for messages.
      operator: linear.
      b: the right side.
      x0: where to begin; zero if it is None, or if its residual is larger than `b`.
      begin: what the method carries at first, from the system and a residual.
      step: one iteration, from the system, x, the residual and what the method carries: the new
        ones, and why it cannot go on, a place in `REASONS`, or -1.
      limits: when it stops.
      symmetric: whether the transpose is the operator itself.
      preconditioner: close to the operator's inverse, up to a factor.
      is_inverse: whether that factor is 1, and the step relies on it.
    """
    fields.check_right_side(method, b)
    b, x0 = jax.tree.map(jnp.asarray, (b, x0))
    fields.check(method, operator, b, x0, preconditioner)
    b = jax.tree.map(_keep_devices, b)
    limits = limits._replace(
        tolerance=lax.stop_gradient(limits.tolerance), absolute=lax.stop_gradient(limits.absolute)
    )
    if x0 is None:
        right: _System = b, None
    else:
        # What is solved for is the correction of x0, whose right side may be far smaller than b.
        size = lax.stop_gradient(fields.mean_size(b))
        x0, correction_b = _begin_at(operator, b, x0, size)
        right = correction_b, jnp.stack([jnp.ones_like(size), size])

    def run(matvec: Callable[[_System], _System], right: _System) -> tuple[_System, tuple]:
        b, reference = right
        operator = lambda x: matvec((x, reference))[0]  # noqa: E731
        scaled = _scale(operator, preconditioner, is_inverse, b)
        x, results = _solve_scaled(scaled, b, reference, begin, step, limits)
        return (x, reference), results

    matvec = lambda x: (operator(x[0]), x[1])  # noqa: E731

    # Jitted: a loop outside jit does not learn from fields on Explicit axes where it has to run.
    @jax.jit
    def solve_for(right: _System) -> tuple[_System, tuple]:
        return lax.custom_linear_solve(matvec, right, run, run, symmetric=symmetric, has_aux=True)

    (x, _), results = solve_for(_instantiate_tangents(right))
    if x0 is None:
        return Solution(x, *results)
    return _judge_sum(operator, b, Solution(fields.plus(x0, 1, x), *results), limits)


def _begin_at(operator: Operator, b: Fields, x0: Fields, size: Scalar) -> tuple[Fields, Fields]:
    """`x0`, or zero if that is nearer to the solution; and the right side of its correction.

    Beside an x0 that is far too large, a correction would be lost in rounding.
    """
    r = fields.minus(b, operator(x0))
    # An x0 that is not finite stays, and so shows.
    is_far = ~(fields.mean_size(r) <= size) & jnp.isfinite(fields.largest(x0))
    is_far = lax.stop_gradient(is_far)
    zero = jax.tree.map(jnp.zeros_like, x0)
    return batched.where(is_far, zero, x0), batched.where(is_far, b, r)


def _judge_sum(operator: Operator, b: Fields, found: Solution, limits: Limits) -> Solution:
    """The solution judged anew, after its correction was added to x0."""
    x, right = lax.stop_gradient((found.x, b))
    size = fields.mean_size(fields.minus(right, operator(x)))
    root = math.sqrt(fields.cells(b))
    absolute = jnp.asarray(limits.absolute, size.dtype) / root
    target = jnp.maximum(limits.tolerance * fields.mean_size(right), absolute)
    converged = size <= target
    reason = jnp.where(found.reason == CONVERGED, STAGNATED, found.reason)
    reason = jnp.where(converged, CONVERGED, reason).astype(jnp.int32)
    return found._replace(residual=size * root, converged=converged, reason=reason)


def _keep_devices(b: Float[Array, "..."]) -> Float[Array, "..."]:
    # x is linear in b, so that a gradient would not read b, which says on which devices it runs.
    return on_devices.keep_in_gradient(b) if jax.typeof(b).sharding.mesh.axis_names else b


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


class _Scaled(NamedTuple):
    """A system in units in which b and the operator are about 1."""

    system: System
    b: Fields
    of_b: Power  # by which the caller's b is larger
    of_x: Power  # likewise


def _scale(
    operator: Operator, preconditioner: Operator | None, is_inverse: bool, b: Fields
) -> _Scaled:
    of_b = fields.exponent_of_any(b)
    unit = fields.times_power_exactly(b, -of_b)
    gain = _gain(operator, unit)
    if preconditioner is None:
        precondition: Operator = lambda r: r  # noqa: E731
    else:
        of_inverse = -gain if is_inverse else _gain(preconditioner, unit)
        precondition = _divide_by_gain(preconditioner, of_inverse)
    return _Scaled(System(_divide_by_gain(operator, gain), precondition), unit, of_b, of_b - gain)


def _gain(function: Operator, unit: Fields) -> Power:
    """The power of two by which `function` makes `unit`, whose largest number is 1, larger."""
    half = min(int(jnp.finfo(leaf.dtype).maxexp) for leaf in jax.tree.leaves(unit)) // 2

    class Attempt(NamedTuple):
        shift: Power  # of what the function is given
        gain: Power
        is_known: Bool[Array, ""]
        number: Int[Array, ""]

    # Once, and a second time only where the first result left the dtype's range.
    def attempt(s: Attempt) -> Attempt:
        result = function(fields.times_power(unit, s.shift))
        most = fields.largest(result)
        is_finite = jnp.isfinite(most)
        gain = fields.exponent(result) - s.shift
        shift = jnp.where(is_finite, half, -half).astype(jnp.int32)
        return Attempt(shift, gain, is_finite & (most > 0), s.number + 1)

    zero = jnp.int32(0)
    first = Attempt(zero, zero, jnp.asarray(False), zero)
    found = batched.while_loop(lambda s: ~s.is_known & (s.number < 2), attempt, first)
    return jnp.where(found.is_known, found.gain, 0)


def _divide_by_gain(function: Operator, gain: Power) -> Operator:
    """`function` times 2**-gain, without numbers on the way that leave the dtype's range."""
    before = -(gain // 2)
    factors = [jnp.ldexp(jnp.ones(()), power) for power in (before, -gain - before)]
    return lambda x: fields.times(function(fields.times(x, factors[0])), factors[1])


def _solve_scaled(
    scaled: _Scaled,
    b: Fields,
    reference: Float[Array, "2"] | None,
    begin: Begin,
    step: Step,
    limits: Limits,
) -> tuple[Fields, tuple[Any, ...]]:
    size = fields.norm(scaled.b)
    relative = size
    if reference is not None:
        of_b = fields.times_power(reference[1], -scaled.of_b) * math.sqrt(fields.cells(b))
        relative = jnp.where(reference[0] == 0, size, of_b)
    # Without a tolerance not even an infinite size is small enough.
    tolerance = jnp.asarray(limits.tolerance, size.dtype)
    relative = jnp.where(tolerance == 0, 0, tolerance * relative)
    absolute = fields.times_power(jnp.asarray(limits.absolute, size.dtype), -scaled.of_b)
    target = jnp.maximum(relative, absolute)
    state = _iterate(scaled, begin, step, target, limits.max_iterations)
    return _judge(state, scaled, target)


class _LoopState(NamedTuple):
    x: Fields
    r: Fields
    carry: Any  # what the method carries besides
    k: Int[Array, ""]
    residuals: Float[Array, " iterations"]
    true_residual: Scalar  # when it was last computed
    best_x: Fields  # of those whose true residual was computed
    best: Scalar  # that residual
    reason: Reason

    def better_x(self) -> Fields:
        """The last x, or the best one: some methods go astray after it."""
        is_worse = jnp.isfinite(self.best) & ~(self.residuals[self.k] <= 2 * self.best)
        return batched.where(is_worse, self.best_x, self.x)


def _iterate(scaled: _Scaled, begin: Begin, step: Step, target: Scalar, most: int) -> _LoopState:
    system, b = scaled.system, scaled.b
    x, r, size = jax.tree.map(jnp.zeros_like, b), b, fields.norm(b)
    # A loop has no history of unknown length: room for all iterations, NaN where none was taken.
    residuals = jnp.full(most + 1, jnp.nan, size.dtype).at[0].set(size)
    # Finite before small: a target may be infinite too.
    reason = jnp.where(size <= target, CONVERGED, GOES_ON)
    reason = jnp.where(jnp.isfinite(size), reason, NOT_FINITE).astype(jnp.int32)
    none = jnp.full_like(size, jnp.inf)
    eps = _epsilon(b)
    first = _LoopState(x, r, begin(system, r), jnp.int32(0), residuals, size, x, none, reason)

    def body(s: _LoopState) -> _LoopState:
        x, r, carry, why = step(system, s.x, s.r, s.carry)
        k, size = s.k + 1, fields.norm(r)
        # So much larger, its rounding errors are as large as the residual that is to be reduced.
        is_astray = ~(size <= s.true_residual / eps)
        x = batched.where(jnp.isfinite(size), x, s.x)
        # The residual that a method carries drifts away from b - A x. So before it counts as small
        # enough, the true one is computed, and the method begins anew from it. The same where it
        # may be nothing but rounding.
        near = size <= jnp.maximum(target, _ROUNDING * eps * s.true_residual)

        def begin_anew() -> tuple[Fields, Any, Scalar, Fields, Scalar]:
            true = _residual(system, b, x)
            size = fields.norm(true)
            # Of two that are as good, the later one is: errors outlast their residuals.
            best_x = batched.where(size <= 2 * s.best, x, s.best_x)
            return true, begin(system, true), size, best_x, jnp.minimum(size, s.best)

        as_before = (r, carry, s.true_residual, s.best_x, s.best)
        r, carry, true, best_x, best = batched.cond(near, begin_anew, as_before)
        # The last one that applies wins.
        reason = jnp.where(k >= most, OUT_OF_ITERATIONS, GOES_ON)
        not_halved = 2 * true > s.true_residual
        reason = jnp.where(near & (true > target) & not_halved, STAGNATED, reason)
        reason = jnp.where(why >= 0, why, reason)
        reason = jnp.where(is_astray, jnp.where(jnp.isfinite(s.best), STAGNATED, DIVERGED), reason)
        reason = jnp.where(near & (true <= target), CONVERGED, reason)
        residuals = s.residuals.at[k].set(jnp.where(near, true, size))
        reason = reason.astype(jnp.int32)
        return _LoopState(x, r, carry, k, residuals, true, best_x, best, reason)

    return batched.while_loop(lambda s: s.reason < 0, body, first)


def _epsilon(a: Fields) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(a))


def _residual(system: System, b: Fields, x: Fields) -> Fields:
    """`b - A x`; x may be so large that sums of a few of its cells overflow."""
    power = jnp.maximum(fields.exponent(x), 0)
    ax = fields.times_power(system.operator(fields.times_power(x, -power)), power)
    return fields.minus(b, ax)


def _judge(s: _LoopState, scaled: _Scaled, target: Scalar) -> tuple[Fields, tuple[Any, ...]]:
    """x in the caller's units, and the other fields of a solution, by the true residual of x."""
    x = fields.times_power(s.better_x(), scaled.of_x)
    # Computed anew: the loop's last residual may have drifted. And of x as it is returned: where
    # the caller's units are beyond its dtype, it is not what the loop found.
    as_returned = fields.times_power(x, -scaled.of_x)
    size = fields.norm(_residual(scaled.system, scaled.b, as_returned))
    is_finite = jnp.isfinite(size)
    converged = is_finite & (size <= target)
    # A step that is lost in rounding says nothing about the operator.
    is_rounding = size <= math.sqrt(_epsilon(x)) * s.residuals[0]
    is_lost = (s.reason == INCONSISTENT) | (s.reason == BREAKDOWN)
    reason = jnp.where(is_lost & is_rounding, STAGNATED, s.reason)
    # Whoever said converged is overruled by the true residual.
    reason = jnp.where(reason == CONVERGED, STAGNATED, reason)
    reason = jnp.where(is_finite, reason, NOT_FINITE)
    reason = jnp.where(converged, CONVERGED, reason).astype(jnp.int32)
    # Zeros would look like a solution, and a gradient cannot say that it is none. An x that is too
    # large says so itself.
    known = is_finite | ~jnp.isfinite(fields.largest(x))
    x = batched.where(known, x, jax.tree.map(lambda x: x + jnp.asarray(jnp.nan, x.dtype), x))
    residuals, size = fields.times_power((s.residuals, size), scaled.of_b)
    return x, (s.k, residuals, size, converged, reason)
