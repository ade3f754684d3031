"""Damped Jacobi iteration: each step adds the residual divided by the operator's diagonal.

Y. Saad, "Iterative Methods for Sparse Linear Systems", 2003, section 4.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator
from wsekern.solvers.solution import (
    ABSOLUTE,
    GOES_ON,
    JAX_NAMES,
    REQUIREMENTS,
    TOLERANCE,
    Limits,
    Reason,
    Solution,
    System,
    is_positive,
    solve,
)
from wsekern.wafer.keywords import accept_jax_names

_MOST = 1000


@accept_jax_names("jacobi", REQUIREMENTS, **JAX_NAMES)
def jacobi(
    operator: Operator,
    b: Fields,
    x0: Fields | None = None,
    *,
    diagonal: Any,
    damping: float = 1.0,
    tolerance: float = TOLERANCE,
    absolute: float = ABSOLUTE,
    max_iterations: int = _MOST,
    tol: float | None = None,
    atol: float | None = None,
    maxiter: int | None = None,
) -> Solution:
    """`x` with `operator(x) = b`: one application and one norm an iteration.

    Converges for diagonally dominant operators. A Laplacian takes about as many iterations as the
    square of the cells along a side of its grid. Differentiable with respect to `b` and to what
    `operator` reads, by another solve.

    Args:
      operator: linear; its transpose has the same diagonal.
      b: the right side: a field, or a pytree of fields, of floats.
      x0: where to begin; zero by default, and if the residual of `x0` is larger than `b`.
      diagonal: the operator's own: a number, or an array that broadcasts to each field of `b`.
      damping: of each step, above 0.
      tolerance: on the residual's norm, relative to b's.
      absolute: on the residual's norm, if larger.
      max_iterations: at most.
      tol: `tolerance`, by the name that `jax.scipy.sparse.linalg` has for it.
      atol: `absolute`, likewise.
      maxiter: `max_iterations`, likewise.

    Raises:
      ValueError: `operator` changes shapes or dtypes, the diagonal does not fit `b` or is 0, an
        option is out of range, or one is given by both names with different values.
    """
    _check(b, diagonal, damping)
    limits = Limits(tolerance, absolute, int(max_iterations))

    def divide(r: Fields) -> Fields:
        return jax.tree.map(lambda f: f * jnp.asarray(damping / diagonal, f.dtype), r)

    return solve(
        "jacobi",
        operator,
        b,
        x0,
        lambda system, r: (),
        _step,
        limits,
        symmetric=False,
        preconditioner=divide,
        is_inverse=True,
    )


def _step(
    system: System, x: Fields, r: Fields, carry: tuple[()]
) -> tuple[Fields, Fields, tuple[()], Reason]:
    move = system.preconditioner(r)
    x, r = fields.plus(x, 1, move), fields.minus(r, system.operator(move))
    return x, r, carry, jnp.int32(GOES_ON)


def _check(b: Fields, diagonal: Any, damping: float) -> None:
    if not is_positive(damping):
        raise ValueError(f"jacobi: damping={damping!r} must be a number above 0")
    if not hasattr(diagonal, "dtype"):
        if not isinstance(diagonal, int | float) or not is_positive(abs(diagonal)):
            raise ValueError(f"jacobi: diagonal={diagonal!r} must be a finite number other than 0")
        return
    for leaf in jax.tree.leaves(b):
        shape = jnp.shape(leaf)
        if diagonal.ndim > len(shape) or any(
            n not in (1, size) for n, size in zip(diagonal.shape[::-1], shape[::-1], strict=False)
        ):
            raise ValueError(
                f"jacobi: diagonal is {list(diagonal.shape)}, which does not broadcast to b's "
                f"{list(shape)}"
            )
