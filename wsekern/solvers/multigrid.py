"""Multigrid on structured grids: V-cycles over grids of half the cells a side.

A. Brandt, "Multi-Level Adaptive Solutions to Boundary-Value Problems", 1977; cells, not points, are
coarsened, as in U. Trottenberg, C. Oosterlee and A. Schueller, "Multigrid", 2001, section 2.8.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern.kernels.stencil.stencil import stencil
from wsekern.solvers import fields
from wsekern.solvers.fields import Fields, Operator, Scalar
from wsekern.solvers.solution import (
    ABSOLUTE,
    DIVERGED,
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
from wsekern.wafer import on_devices
from wsekern.wafer.keywords import accept_jax_names

Field = Float[Array, "..."]

_MOST = 50
_COARSEST = 4  # cells along the shortest side of the coarsest grid, or fewer
_SWEEPS = 40  # on the coarsest grid
_GROWN = 10.0  # relative to the first residual: one so large does not come down again


@accept_jax_names("multigrid", REQUIREMENTS, **JAX_NAMES)
def multigrid(
    operator_at: Callable[[int], Operator],
    b: Field,
    *,
    diagonal_at: Callable[[int], Any],
    sweeps: tuple[int, int] = (2, 2),
    damping: float = 0.8,
    tolerance: float = TOLERANCE,
    absolute: float = ABSOLUTE,
    max_iterations: int = _MOST,
    tol: float | None = None,
    atol: float | None = None,
    maxiter: int | None = None,
) -> Solution:
    """`x` with `operator_at(1)(x) = b`, by V-cycles; an iteration is one cycle.

    A cycle of (2, 2) takes about six applications of the operator at full size, in two dimensions,
    and reduces the residual of a Laplacian by a factor of 5.2 to 5.6 in the long run, and by
    more at first, on grids of any size. Differentiable with respect to `b` and to what the operator
    reads, by another solve. As a preconditioner: `cg(A, b, preconditioner=v_cycle(...))`.

    Args:
      operator_at: the operator on each grid. Its argument says how many times as wide as `b`'s the
        cells of a grid are: 1, 2, 4, ... Values lie in the middle of cells, walls on the faces of
        the outermost cells: that is a stencil with `boundary="edge"`, or `lambda near: -near` for
        zero on the wall. "zero" has its wall half a cell farther out, at another place on each
        grid, and cycles would diverge. To have it where the finest grid has it, let coarser ones
        say `lambda near: -(level - 1) / (level + 1) * near`; a cycle then reduces by 2.8.
      b: the right side, one field; its sides are halved as often as they are even.
      diagonal_at: likewise, that operator's diagonal: a number, or a field.
      sweeps: of damped Jacobi before a coarser grid is visited, and after.
      damping: of the sweeps.
      tolerance: on the residual's norm, relative to b's.
      absolute: on the residual's norm, if larger.
      max_iterations: cycles at most.
      tol: `tolerance`, by the name that `jax.scipy.sparse.linalg` has for it.
      atol: `absolute`, likewise.
      maxiter: `max_iterations`, likewise.

    Raises:
      ValueError: b is not one field or has a side that is too short to halve; an option is out of
        range, or given by both names with different values; or a coarser operator is a stencil, or
        a `functools.partial` of one, whose boundary is "zero". Where that cannot be seen, the
        solution's reason is that it diverged.
    """
    _check(operator_at, b, diagonal_at, sweeps, damping)
    limits = Limits(tolerance, absolute, int(max_iterations))
    cycle = v_cycle(operator_at, b.shape, diagonal_at=diagonal_at, sweeps=sweeps, damping=damping)

    return solve(
        "multigrid",
        operator_at(1),
        b,
        None,
        lambda system, r: fields.norm(r),
        _step,
        limits,
        symmetric=True,
        preconditioner=cycle,
        is_inverse=True,
    )


def _step(
    system: System, x: Fields, r: Fields, first_norm: Scalar
) -> tuple[Fields, Fields, Scalar, Reason]:
    move = system.preconditioner(r)
    x, r = fields.plus(x, 1, move), fields.minus(r, system.operator(move))
    grown = fields.norm(r) > _GROWN * first_norm
    return x, r, first_norm, jnp.where(grown, DIVERGED, GOES_ON)


def v_cycle(
    operator_at: Callable[[int], Operator],
    shape: Sequence[int],
    *,
    diagonal_at: Callable[[int], Any],
    sweeps: tuple[int, int] = (2, 2),
    damping: float = 0.8,
) -> Operator:
    """One V-cycle from zero, a linear function of a right side: close to the operator's inverse.

    Sweeps of (s, t) apply the operator s + t times on each grid. Together that is the work of
    4/3 (s + t) times at full size in two dimensions, and of 8/7 (s + t) times in three. The
    coarsest grid takes 40 sweeps over its few cells. XLA chooses what is sent between two grids.

    Args:
      operator_at: the operator on each grid. Its argument says how many times as wide as the finest
        grid's the cells of a grid are: 1, 2, 4, ... Values lie in the middle of cells, walls on the
        faces of the outermost cells: that is a stencil with `boundary="edge"`, or `lambda near:
        -near` for zero on the wall.
      shape: of the field; its sides are halved as often as they are even.
      diagonal_at: that operator's diagonal, a number or a field.
      sweeps: of damped Jacobi before a coarser grid is visited, and after; as many before as after
        make the cycle symmetric, as a preconditioner of `cg` has to be.
      damping: of the sweeps.

    Raises:
      ValueError: a coarser operator is a stencil whose boundary is "zero".
    """
    levels = _levels(shape)
    _check_walls(operator_at, levels)

    def smooth(level: int, x: Field, b: Field, times: int) -> Field:
        operator, step = operator_at(level), damping / jnp.asarray(diagonal_at(level), b.dtype)
        for _ in range(times):
            x = x + step * (b - operator(x))
        return x

    def cycle(level: int, b: Field) -> Field:
        step = damping / jnp.asarray(diagonal_at(level), b.dtype)
        if level == levels[-1]:
            sweep = lambda _, x: x + step * (b - operator_at(level)(x))  # noqa: E731
            return jax.lax.fori_loop(0, _SWEEPS, sweep, step * b)
        # From zero, the first sweep is just `step * b`.
        x = smooth(level, step * b, b, sweeps[0] - 1)
        residual = b - operator_at(level)(x)
        half = tuple(n // 2 for n in b.shape)
        coarse = on_devices.on_auto_axes(restrict, residual, like=b, shape=half)
        correction = cycle(2 * level, coarse)
        fine = on_devices.on_auto_axes(prolong, correction, like=b, shape=b.shape)
        return smooth(level, x + fine, b, sweeps[1])

    return lambda b: cycle(1, b)


def restrict(u: Field) -> Field:
    """Means of two cells along each dimension."""
    for axis in range(u.ndim):
        pairs = u.reshape(*u.shape[:axis], -1, 2, *u.shape[axis + 1 :])
        u = pairs.mean(axis + 1)
    return u


def prolong(u: Field) -> Field:
    """Each cell as two along each dimension, linear between the middles, flat at the ends.

    Two cells a, b become a, 3/4 a + 1/4 b, 1/4 a + 3/4 b, b.
    """
    # The middles of fine cells lie a quarter of a coarse cell from that cell's own middle.
    for axis in range(u.ndim):
        before = jnp.concatenate([_part(u, axis, 0, 1), _part(u, axis, 0, -1)], axis)
        behind = jnp.concatenate([_part(u, axis, 1, None), _part(u, axis, -1, None)], axis)
        pairs = jnp.stack([0.75 * u + 0.25 * before, 0.75 * u + 0.25 * behind], axis + 1)
        u = pairs.reshape(*u.shape[:axis], -1, *u.shape[axis + 1 :])
    return u


def _part(u: Field, axis: int, start: int, stop: int | None) -> Field:
    return u[(slice(None),) * axis + (slice(start, stop),)]


def _levels(shape: Sequence[int]) -> list[int]:
    # Powers of two, as long as every side is even there and long enough.
    levels = [1]
    while all(n // levels[-1] % 2 == 0 and n // levels[-1] > _COARSEST for n in shape):
        levels.append(2 * levels[-1])
    return levels


def _check(
    operator_at: Any, b: Any, diagonal_at: Any, sweeps: tuple[int, int], damping: float
) -> None:
    if not hasattr(b, "shape"):
        raise ValueError(f"multigrid: b is a {type(b).__name__}; it must be one field")
    if not b.shape or _levels(b.shape) == [1]:
        raise ValueError(
            f"multigrid: b is {b.shape}, whose sides cannot be halved; make them multiples of a "
            f"power of two, and longer than {_COARSEST}"
        )
    for name, function in (("operator_at", operator_at), ("diagonal_at", diagonal_at)):
        if not callable(function):
            raise ValueError(
                f"multigrid: {name} is a {type(function).__name__}; it must be a function of the "
                "level, 1 for the finest grid"
            )
    if not callable(operator_at(1)):
        raise ValueError(
            f"multigrid: operator_at(1) is a {type(operator_at(1)).__name__}; it must be a "
            "function of fields"
        )
    is_pair = isinstance(sweeps, tuple | list) and len(sweeps) == 2
    if not is_pair or min(sweeps) < 1 or not is_positive(damping):
        raise ValueError(
            f"multigrid: sweeps={sweeps} must be a pair of 1 or more, damping={damping!r} a number "
            "above 0"
        )


def _check_walls(operator_at: Callable[[int], Operator], levels: Sequence[int]) -> None:
    for level in levels[1:]:
        operator = operator_at(level)
        if not isinstance(operator, functools.partial) or operator.func is not stencil:
            continue
        boundary = operator.keywords.get("boundary", "zero")
        sides = boundary if isinstance(boundary, list | tuple) else [boundary]
        if any(isinstance(side, float | int) or side == "zero" for side in _flatten(sides)):
            raise ValueError(
                f"multigrid: operator_at({level}) is a stencil with boundary={boundary!r}, whose "
                "wall lies half a cell beyond the faces, and so elsewhere on every grid; put it on "
                "the faces with boundary=lambda near: -near, or on coarser grids take "
                "boundary=lambda near: -(level - 1) / (level + 1) * near"
            )


def _flatten(sides: Sequence[Any]) -> Iterator[Any]:
    for side in sides:
        yield from side if isinstance(side, list | tuple) else [side]
