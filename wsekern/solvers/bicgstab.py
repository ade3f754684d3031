"""The stabilized biconjugate gradient method, for operators of any symmetry.

H. A. van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the Solution of
Nonsymmetric Linear Systems", 1992.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from wsekern.solvers import batched, fields
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
# A direction whose slope is this many roundings of the steepest one lies in the null space. Sound
# systems have slopes as small as the inverse of their condition number.
_FLAT = 8


@accept_jax_names("bicgstab", REQUIREMENTS, **JAX_NAMES, M="preconditioner")
def bicgstab(
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
    """`x` with `operator(x) = b`: two applications and six inner products an iteration.

    Holds eight fields besides `b`. When the residual has become orthogonal to the first one, the
    method begins anew from where it is. Differentiable with respect to `b` and to what `operator`
    reads, by another solve; a reverse-mode derivative solves with the operator's transpose.

    Args:
      operator: linear.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; zero by default, and if the residual of `x0` is larger than `b`.
      preconditioner: close to the operator's inverse, linear.
      tolerance: on the residual's norm, relative to b's.
      absolute: on the residual's norm, if larger.
      max_iterations: at most.
      tol: `tolerance`, by the name that `jax.scipy.sparse.linalg.bicgstab` has for it.
      atol: `absolute`, likewise.
      maxiter: `max_iterations`, likewise.
      M: `preconditioner`, likewise.

    Raises:
      ValueError: `operator` changes shapes or dtypes, an option is out of range, or one is given by
        both names with different values.
    """
    limits = Limits(tolerance, absolute, int(max_iterations))
    return solve(
        "bicgstab",
        operator,
        b,
        x0,
        _begin,
        _step,
        limits,
        symmetric=False,
        preconditioner=preconditioner,
    )


class _Carry(NamedTuple):
    shadow: Fields  # the first residual
    p: Fields  # the direction
    rho: Scalar  # product of the shadow and the residual
    shadow_square: Scalar
    r_square: Scalar
    steepest: Scalar


def _begin(system: System, r: Fields) -> _Carry:
    square = fields.dot(r, r)
    return _Carry(r, r, square, square, square, jnp.zeros_like(square))


def _step(
    system: System, x: Fields, r: Fields, carry: _Carry
) -> tuple[Fields, Fields, _Carry, Reason]:
    shadow, p, rho, shadow_square, r_square, steepest = carry
    y = system.preconditioner(p)
    v = system.operator(y)
    of_y = fields.largest(y)
    slope = fields.largest(v) / jnp.where(of_y == 0, 1, of_y)
    steepest = jnp.maximum(steepest, slope)
    shadow_v = fields.dot(shadow, v)
    # A product below this is rounding: the two are orthogonal to each other.
    orthogonal = jnp.finfo(rho.dtype).eps * jnp.sqrt(shadow_square)
    stuck = jnp.abs(shadow_v) <= orthogonal * fields.norm(v)
    alpha = jnp.where(stuck, 0, _ratio(rho, shadow_v))
    s = fields.plus(r, -alpha, v)
    z = system.preconditioner(s)
    t = system.operator(z)
    tt = fields.dot(t, t)
    omega = _ratio(fields.dot(t, s), tt)
    x = fields.plus(fields.plus(x, alpha, y), omega, z)
    r = fields.plus(s, -omega, t)
    rho_new = fields.dot(shadow, r)
    beta = _ratio(rho_new, rho) * _ratio(alpha, omega)
    p = fields.plus(r, beta, fields.plus(p, -omega, v))
    lost = stuck | (jnp.abs(rho_new) <= orthogonal * fields.norm(r))
    # Where rho is the residual's square the method has just begun anew: no direction is better.
    broke = stuck & (rho == r_square)
    r_square_new = fields.dot(r, r)
    continued = _Carry(shadow, p, rho_new, shadow_square, r_square_new, steepest)
    anew = _Carry(r, r, r_square_new, r_square_new, r_square_new, steepest)
    carried = batched.where(lost, anew, continued)
    why = jnp.where(broke | ((tt == 0) & (fields.dot(s, s) > 0)), BREAKDOWN, GOES_ON)
    flat = _FLAT * jnp.finfo(slope.dtype).eps * steepest
    why = jnp.where(slope <= flat, INCONSISTENT, why)
    return x, r, carried, why


def _ratio(a: Scalar, b: Scalar) -> Scalar:
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
