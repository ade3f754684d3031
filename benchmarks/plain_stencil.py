"""This file is stencils as a user writes them without the library, and their updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

# Of the second derivative, to eighth order.
_EIGHTH = (-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560)
RADII: dict[str, Any] = {"5-point": 1, "9-point": 1, "25-point": (4, 4, 4)}


def five_points(v: jax.Array) -> jax.Array:
    """Heat: a cell and its four neighbors."""
    around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
    return v[1:-1, 1:-1] + 0.1 * (around - 4 * v[1:-1, 1:-1])


def nine_points(v: jax.Array) -> jax.Array:
    """Heat: a cell and all eight around it."""
    around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
    corners = v[2:, 2:] + v[2:, :-2] + v[:-2, 2:] + v[:-2, :-2]
    return v[1:-1, 1:-1] + 0.05 * (around + corners - 8 * v[1:-1, 1:-1])


def twenty_five_points(v: jax.Array) -> jax.Array:
    """Heat: four cells to either side in three dimensions."""
    inside = (slice(4, -4),) * 3
    out = (1 + 0.3 * _EIGHTH[0]) * v[inside]
    for i, weight in enumerate(_EIGHTH[1:], 1):
        for axis in range(3):
            for by in (i, -i):
                moved = slice(4 + by, v.shape[axis] - 4 + by)
                out += 0.1 * weight * v[*inside[:axis], moved, *inside[axis + 1 :]]
    return out


UPDATES: dict[str, Callable] = {
    "5-point": five_points,
    "9-point": nine_points,
    "25-point": twenty_five_points,
}


def rolled(u: jax.Array, name: str, steps: int) -> jax.Array:
    """`steps` steps of a periodic field by `jnp.roll`: what a user has on any mesh under jit."""
    import jax

    return jax.lax.fori_loop(0, steps, lambda _, u: _ROLLED[name](u), u)


def padded(u: jax.Array, name: str, steps: int, unrolled: int) -> jax.Array:
    """`steps` steps of a periodic field on one device, by padding, `unrolled` of them at once."""
    import jax
    import jax.numpy as jnp

    margin = unrolled * (4 if name == "25-point" else 1)

    def some(_, u):
        # Of two dimensions, a third is of columns that nothing leaves.
        wide = [(margin, margin)] * (3 if name == "25-point" else 2)
        v = jnp.pad(u, wide + [(0, 0)] * (u.ndim - len(wide)), mode="wrap")
        for _ in range(unrolled):
            v = UPDATES[name](v)
        return v

    return jax.lax.fori_loop(0, steps // unrolled, some, u)


def exchanged(wafer: Any, width: int) -> Callable:
    """One periodic halo exchange of a field of two dimensions, written out by hand."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec as P

    def shift(slab, axis, by):
        size = wafer.axis_size(axis)
        return lax.ppermute(slab, axis, [(i, (i + by) % size) for i in range(size)])

    def per_pe(u):
        rows, columns = u.shape
        v = jnp.pad(u, width)
        down, up = shift(u[-width:], "y", 1), shift(u[:width], "y", -1)
        v = lax.dynamic_update_slice(v, down, (0, width))
        v = lax.dynamic_update_slice(v, up, (width + rows, width))
        west = shift(v[:, columns : columns + width], "x", 1)
        east = shift(v[:, width : 2 * width], "x", -1)
        v = lax.dynamic_update_slice(v, west, (0, 0))
        return lax.dynamic_update_slice(v, east, (0, width + columns))

    tiled = P("y", "x")
    return jax.shard_map(per_pe, mesh=wafer.device_mesh, in_specs=tiled, out_specs=tiled)


def _rolled_5(u):
    import jax.numpy as jnp

    around = jnp.roll(u, 1, 0) + jnp.roll(u, -1, 0) + jnp.roll(u, 1, 1) + jnp.roll(u, -1, 1)
    return u + 0.1 * (around - 4 * u)


def _rolled_9(u):
    import jax.numpy as jnp

    around = jnp.roll(u, 1, 0) + jnp.roll(u, -1, 0) + jnp.roll(u, 1, 1) + jnp.roll(u, -1, 1)
    for down in (1, -1):
        for right in (1, -1):
            around += jnp.roll(u, (down, right), (0, 1))
    return u + 0.05 * (around - 8 * u)


def _rolled_25(u):
    import jax.numpy as jnp

    out = (1 + 0.3 * _EIGHTH[0]) * u
    for i, weight in enumerate(_EIGHTH[1:], 1):
        for axis in range(3):
            out += 0.1 * weight * (jnp.roll(u, i, axis) + jnp.roll(u, -i, axis))
    return out


_ROLLED: dict[str, Callable] = {
    "5-point": _rolled_5,
    "9-point": _rolled_9,
    "25-point": _rolled_25,
}
