"""This file is shares of the meeting dimension of a matrix product.

Public per-PE functions, of tiles. A share is the same part of every tile, not some tiles: whoever
multiplies a share moves no more words than that share's.
"""

import math

import jax
import jax.numpy as jnp

from wsekern import fabric
from wsekern.wafer.axes import COLS, ROWS


def cut_columns(x: jax.Array, shares: int) -> jax.Array:
    """The tile's shares of its last dimension, [shares, ...]."""
    return _cut(x, -1, _blocks(COLS), shares)


def cut_rows(y: jax.Array, shares: int) -> jax.Array:
    """The tile's shares of its last dimension but one, [shares, ...]."""
    return _cut(y, -2, _blocks(ROWS), shares)


def joined_columns(shares: jax.Array) -> jax.Array:
    """The inverse of `cut_columns`."""
    return _joined(shares, -1, _blocks(COLS))


def joined_rows(shares: jax.Array) -> jax.Array:
    """The inverse of `cut_rows`."""
    return _joined(shares, -2, _blocks(ROWS))


def _blocks(along: str) -> int:
    # What is cut into as many blocks along x as along y has the same share of each block in both.
    size = fabric.axis_size(along)
    return math.lcm(fabric.axis_size(ROWS), fabric.axis_size(COLS)) // size


def _cut(x, axis, blocks, shares):
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    apart = jnp.moveaxis(jnp.reshape(x, (*before, blocks, shares, -1, *after)), axis + 1, 0)
    return jnp.reshape(apart, (shares, *before, -1, *after))


def _joined(shares, axis, blocks):
    axis %= shares.ndim - 1
    before, after = shares.shape[1 : axis + 1], shares.shape[axis + 2 :]
    apart = jnp.reshape(shares, (shares.shape[0], *before, blocks, -1, *after))
    return jnp.reshape(jnp.moveaxis(apart, 0, axis + 1), (*before, -1, *after))
