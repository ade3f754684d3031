"""This file is panels of a matrix, as far as one PE's tile has its part in them.

Public per-PE functions. A panel and a tile cut a dimension into different lengths; where a panel
begins is told from the tile's first place, and may lie before it or behind its last.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int


def overlap(x: jax.Array, axis: int, start: Int[Array, ""], width: int) -> jax.Array:
    """Places `start` to `start + width` of a tile of any length; zeros where it has none."""
    if x.shape[axis] >= width:
        return part(x, axis, start, width)
    axis %= x.ndim
    empty = jnp.zeros((*x.shape[:axis], width, *x.shape[axis + 1 :]), x.dtype)
    return put(empty, x, axis, -start)


def part(x: jax.Array, axis: int, start: Int[Array, ""], width: int) -> jax.Array:
    """Places `start` to `start + width` of a tile, which has no fewer; zeros where it has none."""
    length = x.shape[axis]
    at = jnp.clip(start, 0, length - width)
    found = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    if length % width:
        found = jnp.roll(found, at - start, axis)
    places = start + _along(found, axis)
    return jnp.where((places >= 0) & (places < length), found, jnp.zeros((), x.dtype))


def put(x: jax.Array, panel: jax.Array, axis: int, start: Int[Array, ""]) -> jax.Array:
    """The tile with `panel` from place `start` on, as far as it has such places."""
    length, width = x.shape[axis], panel.shape[axis]
    at = jnp.clip(start, 0, length - width)
    if length % width:
        panel = jnp.roll(panel, start - at, axis)
    old = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    places = at - start + _along(panel, axis)
    new = jnp.where((places >= 0) & (places < width), panel, old)
    return lax.dynamic_update_slice_in_dim(x, new, at, axis % x.ndim)


def _along(x: jax.Array, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
