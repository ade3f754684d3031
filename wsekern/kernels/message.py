"""This file is several tiles in one message to a neighbor, whatever their shapes and dtypes."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric


def shift_together(
    tiles: Sequence[jax.Array], along: tuple[str, ...], by: int, *, periodic: bool
) -> list[jax.Array]:
    """The tiles of the PE `by` (1 or -1) places before, in one message; a per-PE function.

    Floating dtypes travel as the widest of them, in which the others have their values exactly, so
    that gradients pass; whole numbers travel as its bits.

    Args:
      tiles: to be sent.
      along: the axes along which the PEs stand in line, outermost first.
      by: 1 towards higher places, -1 towards lower ones.
      periodic: whether the ends of the line meet; else what a PE at an open end gets is undefined.
    """
    if len(tiles) == 1:
        return [_shift(tiles[0], along, by, periodic)]
    carrier = _carrier(tiles)
    packed = jnp.concatenate([_packed(t, carrier).ravel() for t in tiles])
    moved = _shift(packed, along, by, periodic)
    begins, got = 0, []
    for tile in tiles:
        part = lax.slice_in_dim(moved, begins, begins + math.prod(tile.shape))
        begins += math.prod(tile.shape)
        got.append(_unpacked(part.reshape(tile.shape), tile.dtype))
    return got


def _shift(tile: jax.Array, along: tuple[str, ...], by: int, periodic: bool) -> jax.Array:
    *outer, inner = along
    if not outer:
        return fabric.shift(tile, inner, by, periodic=periodic)
    # The innermost axis wraps, and what wrapped goes one place further along the others.
    moved = fabric.shift(tile, inner, by)
    further = _shift(moved, tuple(outer), by, periodic)
    entered = fabric.axis_index(inner) == (0 if by > 0 else fabric.axis_size(inner) - 1)
    return jnp.where(entered, further, moved)


def _carrier(tiles: Sequence[jax.Array]) -> jnp.dtype:
    widest = max(tile.dtype.itemsize for tile in tiles)
    floats = [tile.dtype for tile in tiles if jnp.issubdtype(tile.dtype, jnp.floating)]
    if len(set(floats)) == 1 and floats[0].itemsize == widest:
        return floats[0]
    return jnp.dtype(jnp.float64 if widest > 4 else jnp.float32)


def _packed(tile: jax.Array, carrier: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(tile.dtype, jnp.floating):
        return tile.astype(carrier)
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[carrier.itemsize]
    return lax.bitcast_convert_type(tile.astype(word), carrier)


def _unpacked(part: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating):
        return part.astype(dtype)
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[part.dtype.itemsize]
    return lax.bitcast_convert_type(part, word).astype(dtype)
