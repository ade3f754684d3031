"""Tiles in padded buffers: how a step gets neighbors' cells around a tile, and what lies where."""

import enum
from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree, Shaped

Tile = Shaped[Array, "..."]  # any number of dimensions, any dtype
Fields: TypeAlias = PyTree[Shaped[Array | np.ndarray, "..."]]  # a field, or a pytree of fields
Tiles = tuple[Tile, ...]  # one for each field
Step = Int[Array, ""] | int  # the number of a step, from 0
Pairs = tuple[tuple[int, int], ...]  # for each dimension: low and high, or begin and end


class Mode(enum.Enum):
    """How a step gets its neighbors' cells around a tile.

    A run that is differentiated has one mode forward and REVERSE backward.
    """

    JOINED = "joined"  # tile and halo are concatenated to a new array in every step
    PADDED = "padded"  # all slabs are cut before any is written, so that they travel together
    CARRIED = "carried"  # a loop carries the buffer on a CPU: slabs are cut and written in turn
    REVERSE = "reverse"  # as CARRIED, with the faster rules of `adjoint`: reverse mode only


def pad_tile(tile: Tile, padding: Pairs) -> Tile:
    """`tile` in a buffer with that many zeros around it."""
    return lax.pad(tile, jnp.zeros((), tile.dtype), [(low, high, 0) for low, high in padding])


def cut_box(buffer: Tile, padding: Pairs, box: Pairs, radius: Pairs) -> Tile:
    """The cells `box` of the tile in `buffer`, with `radius` more cells around them.

    With a padding of 2, a tile of 4 cells is cut with a radius of 1:

      buffer   0 1 2 3 4 5 6 7      (the tile's cells are 2 3 4 5)
      box          2 3 4 5
      result     1 2 3 4 5 6
    """
    begin = [low + first - r for (low, _), (first, _), (r, _) in _zip(padding, box, radius)]
    end = [low + last + r for (low, _), (_, last), (_, r) in _zip(padding, box, radius)]
    return lax.slice(buffer, begin, end)


def cut_line(buffer: Tile, dim: int, start: int, count: int) -> Tile:
    """`count` cells of one dimension from `start` on."""
    return lax.slice_in_dim(buffer, start, start + count, axis=dim)


def ends(starts: Sequence[int], shape: Sequence[int]) -> list[int]:
    """Where a slab of that shape ends."""
    return [start + size for start, size in zip(starts, shape, strict=True)]


def _zip(*pairs: Pairs) -> zip:
    return zip(*pairs, strict=True)
