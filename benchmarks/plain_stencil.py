"""Stencils as a user writes them without the library, and their updates: peers for `stencil`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

# Weights of the second derivative to eighth order: the center, then 1 to 4 cells away.
_EIGHTH = (-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560)
RADII: dict[str, Any] = {"5-point": 1, "9-point": 1, "25-point": (4, 4, 4)}


def five_points(v: jax.Array) -> jax.Array:
    """Heat: a cell and its four neighbors."""
    around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
    return v[1:-1, 1:-1] + 0.1 * (around - 4 * v[1:-1, 1:-1])


def nine_points(v: jax.Array) -> jax.Array:
    """Heat: a cell and the eight around it."""
    around = v[2:, 1:-1] + v[:-2, 1:-1] + v[1:-1, 2:] + v[1:-1, :-2]
    corners = v[2:, 2:] + v[2:, :-2] + v[:-2, 2:] + v[:-2, :-2]
    return v[1:-1, 1:-1] + 0.05 * (around + corners - 8 * v[1:-1, 1:-1])


def twenty_five_points(v: jax.Array) -> jax.Array:
    """Heat in three dimensions: four cells to either side along each."""
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


def step_by_roll(u: jax.Array, name: str, steps: int) -> jax.Array:
    """`steps` steps of a periodic field by `jnp.roll`: under jit it runs on any mesh."""
    import jax

    return jax.lax.fori_loop(0, steps, lambda _, u: _ROLLED[name](u), u)


def step_by_pad(u: jax.Array, name: str, steps: int, unrolled: int) -> jax.Array:
    """`steps` steps of a periodic field on one device; pads once for every `unrolled` steps."""
    import jax
    import jax.numpy as jnp

    margin = unrolled * (4 if name == "25-point" else 1)

    def some(_, u):
        # In a 2-D stencil a third dimension holds columns, which are not padded.
        wide = [(margin, margin)] * (3 if name == "25-point" else 2)
        v = jnp.pad(u, wide + [(0, 0)] * (u.ndim - len(wide)), mode="wrap")
        for _ in range(unrolled):
            v = UPDATES[name](v)
        return v

    return jax.lax.fori_loop(0, steps // unrolled, some, u)


def exchange_by_hand(wafer: Any, width: int) -> Callable:
    """One periodic halo exchange of a 2-D field, written by hand with shard_map."""
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
