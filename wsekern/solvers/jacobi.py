"""This file is Jacobi's iteration, damped: a step along what the diagonal makes of the residual.

Y. Saad, "Iterative Methods for Sparse Linear Systems", 2003, section 4.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator
from wsekern.solvers.solution import Solution, solve


def jacobi(
    operator: Operator,
    b: Fields,
    x0: Fields | None = None,
    *,
    diagonal: Any,
    damping: float = 1.0,
    tolerance: float = 1e-5,
    absolute: float = 0.0,
    max_iterations: int = 1000,
) -> Solution:
    """`x` with `operator(x) = b`: one application and one norm an iteration.

    Converges for diagonally dominant operators; as many iterations as a grid has cells along its
    side squared, for a Laplacian. Differentiable as `cg` is.

    Args:
      operator: linear; its transpose has the same diagonal.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; by default at zero.
      diagonal: the operator's own: a number, or what broadcasts to each field of `b`.
      damping: of each step, above 0.
      tolerance: of the residual's norm, as a share of b's.
      absolute: of the residual's norm, if larger.
      max_iterations: at most.

    Raises:
      ValueError: `operator` changes shapes or dtypes, or an option does not fit.
    """
    if not damping > 0:
        raise ValueError(f"jacobi: damping={damping} must be above 0")

    def step(matvec, x, r, rest):
        move = jax.tree.map(lambda f: f * jnp.asarray(damping / diagonal, f.dtype), r)
        x, r = fields.plus(x, 1, move), fields.minus(r, matvec(move))
        return x, r, rest, jnp.int32(-1)

    return solve(
        "jacobi",
        operator,
        b,
        x0,
        lambda r: (),
        step,
        tolerance=tolerance,
        absolute=absolute,
        max_iterations=max_iterations,
        symmetric=False,
    )
