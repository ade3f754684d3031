"""Panels of a matrix: what one PE's tile has of them.

Public per-PE functions. A panel is a slice of the whole matrix, and it need not begin or end where
a tile does. `start` is where the panel begins, counted from the tile's first place: negative if the
panel begins in an earlier tile.

    tile of places 4..7, panel of places 6..9:  start = 2, the tile has the panel's first two
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped


def take_padded(
    x: Shaped[Array, "..."], axis: int, start: Int[Array, ""], width: int
) -> Shaped[Array, "..."]:
    """The panel of `width` places, with zeros where the tile has none; a tile of any length."""
    if x.shape[axis] >= width:
        return take(x, axis, start, width)
    axis %= x.ndim
    empty = jnp.zeros((*x.shape[:axis], width, *x.shape[axis + 1 :]), x.dtype)
    return put(empty, x, axis, -start)


def take(
    x: Shaped[Array, "..."], axis: int, start: Int[Array, ""], width: int
) -> Shaped[Array, "..."]:
    """The panel, with zeros where the tile has no part in it; a tile no shorter than the panel."""
    length = x.shape[axis]
    at = jnp.clip(start, 0, length - width)
    taken = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    # Where the slice was clipped it is not aligned with the panel. If the width divides the length,
    # tile and panel overlap wholly or not at all, and the mask below is enough.
    if length % width:
        taken = jnp.roll(taken, at - start, axis)
    places = start + _places(taken, axis)
    return jnp.where((places >= 0) & (places < length), taken, jnp.zeros((), x.dtype))


def put(
    x: Shaped[Array, "..."], panel: Shaped[Array, "..."], axis: int, start: Int[Array, ""]
) -> Shaped[Array, "..."]:
    """The tile with the panel written over the places that they have in common."""
    length, width = x.shape[axis], panel.shape[axis]
    at = jnp.clip(start, 0, length - width)
    if length % width:  # as in `take`
        panel = jnp.roll(panel, start - at, axis)
    old = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    places = at - start + _places(panel, axis)
    new = jnp.where((places >= 0) & (places < width), panel, old)
    return lax.dynamic_update_slice_in_dim(x, new, at, axis % x.ndim)


def _places(x: Shaped[Array, "..."], axis: int) -> Int[Array, "..."]:
    return lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
