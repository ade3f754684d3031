"""Conjugate gradients, plain and preconditioned, for symmetric definite operators.

M. R. Hestenes and E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator, Scalar
from wsekern.solvers.solution import (
    ABSOLUTE,
    BREAKDOWN,
    GOES_ON,
    INCONSISTENT,
    JAX_NAMES,
    REQUIREMENTS,
    TOLERANCE,
    Limits,
    Reason,
    Solution,
    System,
    solve,
)
from wsekern.wafer.keywords import accept_jax_names

_MOST = 1000
# A direction whose slope is below this share of the steepest one is flat: the operator maps it to
# next to nothing, and the sign of its curvature may be rounding.
_FLAT = 1e-3


@accept_jax_names("cg", REQUIREMENTS, **JAX_NAMES, M="preconditioner")
def cg(
    operator: Operator,
    b: Fields,
    x0: Fields | None = None,
    *,
    preconditioner: Operator | None = None,
    tolerance: float = TOLERANCE,
    absolute: float = ABSOLUTE,
    max_iterations: int = _MOST,
    tol: float | None = None,
    atol: float | None = None,
    maxiter: int | None = None,
    M: Operator | None = None,
) -> Solution:
    """`x` with `operator(x) = b`: one application and three inner products an iteration.

    A negative definite operator, such as a Laplacian, works as well as a positive one. Holds four
    fields besides `b`. Differentiable with respect to `b` and to what `operator` reads, by another
    solve. A singular system that has a solution is solved, from `x0` = 0 for the smallest one.

    Args:
      operator: linear and symmetric.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; zero by default, and if the residual of `x0` is larger than `b`.
      preconditioner: close to the operator's inverse, linear, symmetric and definite.
      tolerance: on the residual's norm, relative to b's.
      absolute: on the residual's norm, if larger.
      max_iterations: at most.
      tol: `tolerance`, by the name that `jax.scipy.sparse.linalg.cg` has for it.
      atol: `absolute`, likewise.
      maxiter: `max_iterations`, likewise.
      M: `preconditioner`, likewise.

    Raises:
      ValueError: `operator` changes shapes or dtypes, an option is out of range, or one is given by
        both names with different values.
    """
    limits = Limits(tolerance, absolute, int(max_iterations))
    return solve(
        "cg", operator, b, x0, _begin, _step, limits, symmetric=True, preconditioner=preconditioner
    )


class _Carry(NamedTuple):
    p: Fields  # the direction
    rz: Scalar  # product of the residual and the preconditioned one
    sign: Scalar  # of the first curvature
    steepest: Scalar


def _begin(system: System, r: Fields) -> _Carry:
    z = system.preconditioner(r)
    rz = fields.dot(r, z)
    return _Carry(z, rz, jnp.zeros_like(rz), jnp.zeros_like(rz))


def _step(
    system: System, x: Fields, r: Fields, carry: _Carry
) -> tuple[Fields, Fields, _Carry, Reason]:
    p, rz, sign, steepest = carry
    ap = system.operator(p)
    square = fields.dot(p, p)
    # With a negative definite preconditioner rz is negative too: the sign makes both cases one.
    curvature = fields.dot(p, ap) * jnp.sign(rz)
    # Definite operators keep the sign of the first curvature; one that changes it is indefinite.
    sign = jnp.where(sign == 0, jnp.sign(curvature), sign)
    slope = jnp.abs(curvature) / jnp.where(square == 0, 1, square)
    steepest = jnp.maximum(steepest, slope)
    rounding = slope <= jnp.finfo(slope.dtype).eps * steepest
    broke = (curvature * sign <= 0) | (rz == 0) | rounding
    # A flat direction lies in the null space of a singular operator.
    why = jnp.where(slope <= _FLAT * steepest, INCONSISTENT, BREAKDOWN)
    alpha = jnp.where(broke, 0, jnp.abs(rz) / jnp.where(broke, 1, curvature))
    x, r = fields.plus(x, alpha, p), fields.plus(r, -alpha, ap)
    z = system.preconditioner(r)
    rz_new = fields.dot(r, z)
    beta = jnp.where(broke, 0, rz_new / jnp.where(broke, 1, rz))
    p = fields.plus(z, beta, p)
    carry = _Carry(p, rz_new, sign, steepest)
    return x, r, carry, jnp.where(broke, why, GOES_ON)
