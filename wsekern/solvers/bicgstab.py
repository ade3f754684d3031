"""This file is the stabilized biconjugate gradient method, for operators of any symmetry.

H. A. van der Vorst, "Bi-CGSTAB: A Fast and Smoothly Converging Variant of Bi-CG for the Solution of
Nonsymmetric Linear Systems", 1992.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator
from wsekern.solvers.solution import BREAKDOWN, INCONSISTENT, Solution, solve

# Of the steepest slope: a direction that is mapped to so little is in the operator's null space.
_FLAT = 1e-4


def bicgstab(
    operator: Operator,
    b: Fields,
    x0: Fields | None = None,
    *,
    preconditioner: Operator | None = None,
    tolerance: float = 1e-5,
    absolute: float = 0.0,
    max_iterations: int = 1000,
) -> Solution:
    """`x` with `operator(x) = b`: two applications and six inner products an iteration.

    Holds seven fields beside `b`. Where the residual has become orthogonal to the first one, the
    method begins anew from where it is. Differentiable as `cg` is; a derivative in reverse solves
    with the operator's transpose.

    Args:
      operator: linear.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; by default at zero.
      preconditioner: near the operator's inverse, linear.
      tolerance: of the residual's norm, as a share of b's.
      absolute: of the residual's norm, if larger.
      max_iterations: at most.

    Raises:
      ValueError: `operator` changes shapes or dtypes, or an option does not fit.
    """
    precondition = preconditioner or (lambda r: r)
    return solve(
        "bicgstab",
        operator,
        b,
        x0,
        _first,
        functools.partial(_step, precondition),
        tolerance=tolerance,
        absolute=absolute,
        max_iterations=max_iterations,
        symmetric=False,
    )


def _first(r):
    return _begin(r), jnp.zeros_like(fields.dot(r, r))


def _begin(r):
    square = fields.dot(r, r)
    # The shadow residual, the direction, their product; squares of the shadow and of the residual.
    return r, r, square, square, square


def _step(precondition, matvec, x, r, rest):
    (shadow, p, rho, far, left), steepest = rest
    y = precondition(p)
    v = matvec(y)
    slope = fields.norm(v) / fields.norm(y)
    steepest = jnp.maximum(steepest, slope)
    across = fields.dot(shadow, v)
    # Of products of what is orthogonal to the first residual only rounding is left.
    orthogonal = jnp.finfo(rho.dtype).eps * jnp.sqrt(far)
    stuck = jnp.abs(across) <= orthogonal * fields.norm(v)
    alpha = jnp.where(stuck, 0, _ratio(rho, across))
    s = fields.plus(r, -alpha, v)
    z = precondition(s)
    t = matvec(z)
    tt = fields.dot(t, t)
    omega = _ratio(fields.dot(t, s), tt)
    x = fields.plus(fields.plus(x, alpha, y), omega, z)
    r = fields.plus(s, -omega, t)
    new = fields.dot(shadow, r)
    beta = _ratio(new, rho) * _ratio(alpha, omega)
    p = fields.plus(r, beta, fields.plus(p, -omega, v))
    lost = stuck | (jnp.abs(new) <= orthogonal * fields.norm(r))
    # Where it has just begun anew, there is no better direction.
    broke = stuck & (rho == left)
    fresh = _begin(r)
    carried = (shadow, p, new, far, fields.dot(r, r))
    rest = jax.tree.map(lambda a, b: jnp.where(lost, a, b), fresh, carried)
    why = jnp.where(broke | ((tt == 0) & (fields.dot(s, s) > 0)), BREAKDOWN, -1)
    why = jnp.where(slope <= _FLAT * steepest, INCONSISTENT, why)
    return x, r, (rest, steepest), why


def _ratio(a, b):
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))
