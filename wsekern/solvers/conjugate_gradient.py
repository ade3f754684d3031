"""This file is conjugate gradients, plain and preconditioned, for symmetric definite operators.

M. R. Hestenes and E. Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator
from wsekern.solvers.solution import BREAKDOWN, INCONSISTENT, Solution, solve

_FLAT = 1e-3  # of the steepest slope: where a sign that changes does so by rounding


def cg(
    operator: Operator,
    b: Fields,
    x0: Fields | None = None,
    *,
    preconditioner: Operator | None = None,
    tolerance: float = 1e-5,
    absolute: float = 0.0,
    max_iterations: int = 1000,
) -> Solution:
    """`x` with `operator(x) = b`: one application, three inner products an iteration.

    A negative definite operator, such as a Laplacian, does as well as a positive one. Holds four
    fields beside `b`. Differentiable with respect to `b` and to what `operator` reads, by another
    solve; a singular system that has a solution is solved, from `x0` = 0 for the smallest one.

    Args:
      operator: linear and symmetric.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; by default at zero.
      preconditioner: near the operator's inverse, linear, symmetric and definite.
      tolerance: of the residual's norm, as a share of b's.
      absolute: of the residual's norm, if larger.
      max_iterations: at most.

    Raises:
      ValueError: `operator` changes shapes or dtypes, or an option does not fit.
    """
    precondition = preconditioner or (lambda r: r)
    return solve(
        "cg",
        operator,
        b,
        x0,
        functools.partial(_begin, precondition),
        functools.partial(_step, precondition),
        tolerance=tolerance,
        absolute=absolute,
        max_iterations=max_iterations,
        symmetric=True,
    )


def _begin(precondition, r):
    z = precondition(r)
    rz = fields.dot(r, z)
    return z, rz, jnp.zeros_like(rz), jnp.zeros_like(rz)


def _step(precondition, matvec, x, r, rest):
    p, rz, sign, steepest = rest
    ap = matvec(p)
    curvature = fields.dot(p, ap) * jnp.sign(rz)
    # Definite operators keep the sign of the first; one that changes it is indefinite.
    sign = jnp.where(sign == 0, jnp.sign(curvature), sign)
    slope = jnp.abs(curvature) / fields.dot(p, p)
    steepest = jnp.maximum(steepest, slope)
    broke = (curvature * sign <= 0) | (rz == 0) | (slope <= jnp.finfo(slope.dtype).eps * steepest)
    # A direction along which it is as good as flat lies in the null space of a singular one.
    why = jnp.where(slope <= _FLAT * steepest, INCONSISTENT, BREAKDOWN)
    along = jnp.where(broke, 0, jnp.abs(rz) / jnp.where(broke, 1, curvature))
    x, r = fields.plus(x, along, p), fields.plus(r, -along, ap)
    z = precondition(r)
    new = fields.dot(r, z)
    p = fields.plus(z, jnp.where(broke, 0, new / jnp.where(broke, 1, rz)), p)
    return x, r, (p, new, sign, steepest), jnp.where(broke, why, -1)
