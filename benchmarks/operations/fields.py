"""The operations on fields: stencils, halos and the solvers of linear systems."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import wsekern as wk
from benchmarks.operations.case import OperandShapes, OperationCase
from wsekern import fabric

_SIDE, _STEPS = 512, 6
_BOUNDARIES = ("periodic", "zero", "edge", "reflect", "symmetric", "fixed")
_CENTER = (slice(1, -1), slice(1, -1))
_TILED = P(("wafer", "y"), "x")


def cases(operands: OperandShapes) -> Iterator[OperationCase]:
    """All of them."""
    yield from _stencils(operands)
    yield from _halos(operands)
    yield from _solvers(operands)


def _heat(u: jax.Array) -> jax.Array:
    return u[_CENTER] + 0.2 * (_around(u) - 4 * u[_CENTER])


def _around(u: jax.Array) -> jax.Array:
    return u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]


def _box(u: jax.Array) -> jax.Array:
    rows = u[2:] + u[1:-1] + u[:-2]
    return (rows[:, 2:] + rows[:, 1:-1] + rows[:, :-2]) / 9


def _wide(u: jax.Array) -> jax.Array:
    """A star of eighth order: four cells to each side."""
    new, inner = u[4:-4, 4:-4], slice(4, -4)
    for reach, weight in enumerate((0.2, -0.02, 0.003, -0.0002), start=1):
        low, high = slice(4 - reach, -4 - reach), slice(4 + reach, -(4 - reach) or None)
        new = new + weight * (u[low, inner] + u[high, inner] + u[inner, low] + u[inner, high])
    return new


def _seven_points(u: jax.Array) -> jax.Array:
    """Three dimensions, of which the last is whole on every PE."""
    new = u[1:-1, 1:-1]
    along_z = jnp.pad(new[:, :, 1:], ((0, 0), (0, 0), (0, 1)))
    along_z = along_z + jnp.pad(new[:, :, :-1], ((0, 0), (0, 0), (1, 0)))
    sides = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    return new + 0.1 * (sides + along_z - 6 * new)


def _wave(state: dict[str, jax.Array], speed: jax.Array) -> dict[str, jax.Array]:
    u = state["u"]
    new = 2 * u[_CENTER] - state["before"][_CENTER]
    return {"u": new + speed[_CENTER] * (_around(u) - 4 * u[_CENTER]), "before": u[_CENTER]}


def _stencils(operands: OperandShapes) -> Iterator[OperationCase]:
    u = operands.floats(_SIDE, _SIDE, spec=_TILED)
    block = operands.floats(_SIDE, _SIDE, 16, spec=P(("wafer", "y"), "x", None))
    points = np.array([[5, 5], [_SIDE // 2, 300]])

    def run(update: Any = _heat, **options: Any) -> Any:
        return functools.partial(
            wk.stencil, **({"update": update, "radius": 1, "steps": _STEPS} | options)
        )

    def waves(state: Any, speed: Any, signal: Any) -> Any:
        return wk.stencil(
            state,
            _wave,
            radius=1,
            steps=_STEPS,
            coefficients=speed,
            sources=wk.Sources(at=points, values=signal, field="u"),
            receivers=wk.Receivers(at=points, field="u"),
        )

    def tile(u: Any) -> jax.Array:
        kernel = functools.partial(
            wk.stencil_tile, update=_heat, along=_TILED, radius=1, steps=_STEPS
        )
        return _map(operands, kernel)(u)

    for boundary in _BOUNDARIES:
        yield OperationCase(f"stencil, {boundary}", run(boundary=boundary), (u,))
    yield OperationCase("stencil, a number beyond", run(boundary=1.5), (u,))
    yield OperationCase("stencil, a function beyond", run(boundary=lambda near: -near), (u,))
    yield OperationCase("stencil, box", run(_box), (u,))
    yield OperationCase("stencil, box, periodic", run(_box, boundary="periodic"), (u,))
    yield OperationCase("stencil of one step", run(steps=1), (u,))
    yield OperationCase("stencil, depth", run(depth=4), (u,))
    yield OperationCase("stencil, depth, periodic", run(depth=4, boundary="periodic"), (u,))
    yield OperationCase("stencil, overlap", run(overlap=True), (u,))
    yield OperationCase("stencil without overlap", run(overlap=False), (u,))
    yield OperationCase("stencil, radius 4", run(_wide, radius=4), (u,))
    yield OperationCase("stencil of three dimensions", run(_seven_points), (block,))
    yield OperationCase("stencil, save_every", run(save_every=3), (u,))
    yield OperationCase("stencil, checkpoint", run(checkpoint="sqrt"), (u,))
    signal = operands.floats(_STEPS, 2, spec=P())
    state = {"u": u, "before": u}
    yield OperationCase("stencil, Sources, Receivers, coefficients", waves, (state, u, signal))
    yield OperationCase("stencil_tile", tile, (u,))


def _halos(operands: OperandShapes) -> Iterator[OperationCase]:
    u = operands.floats(_SIDE, _SIDE, spec=_TILED)

    def tile(u: Any) -> jax.Array:
        return _map(operands, lambda t: wk.halo_tile(t, _TILED, 1, boundary="edge"))(u)

    for boundary in _BOUNDARIES:
        exchange = functools.partial(wk.halo_exchange, width=2, boundary=boundary)
        yield OperationCase(f"halo_exchange, {boundary}", exchange, (u,))
    faces = functools.partial(wk.halo_exchange, width=2, corners=False)
    yield OperationCase("halo_exchange without corners", faces, (u,))
    yield OperationCase("halo_tile", tile, (u,))
    yield OperationCase(
        "halo_exchange and crop", lambda u: wk.crop(wk.halo_exchange(u, 2), 2), (u,)
    )


def _poisson(level: int, boundary: Any = "edge", shift: float = 0.01) -> Any:
    """A negative Laplacian plus `shift`, on cells `level` times as wide."""

    def update(u: jax.Array) -> jax.Array:
        return (4 * u[_CENTER] - _around(u)) / level**2 + shift * u[_CENTER]

    return functools.partial(wk.stencil, update=update, radius=1, boundary=boundary)


def _solvers(operands: OperandShapes) -> Iterator[OperationCase]:
    b = operands.floats(_SIDE, _SIDE, spec=_TILED)
    side = 10 * 16  # of a side that is halved five times
    coarse = operands.floats(side, side, spec=_TILED)
    levels: dict[str, Any] = {
        "operator_at": _poisson,
        "diagonal_at": lambda level: 4 / level**2 + 0.01,
    }

    def preconditioned(b: Any) -> jax.Array:
        cycle = wk.v_cycle(shape=(side, side), **levels)
        return wk.cg(_poisson(1), b, preconditioner=cycle).x

    yield OperationCase("cg", lambda b: wk.cg(_poisson(1), b).x, (b,))
    yield OperationCase("bicgstab", lambda b: wk.bicgstab(_poisson(1), b).x, (b,))
    yield OperationCase("jacobi", lambda b: wk.jacobi(_poisson(1), b, diagonal=4.01).x, (b,))
    yield OperationCase("multigrid", lambda b: wk.multigrid(b=b, **levels).x, (coarse,))
    yield OperationCase("v_cycle", lambda b: wk.v_cycle(shape=(side, side), **levels)(b), (coarse,))
    yield OperationCase("cg, preconditioner v_cycle", preconditioned, (coarse,))


def _map(operands: OperandShapes, kernel: Any) -> Any:
    return operands.wafer.map(
        lambda tile: fabric.varying(kernel(tile)), in_specs=_TILED, out_specs=_TILED
    )
