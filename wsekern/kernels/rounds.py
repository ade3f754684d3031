"""This file is the matrix product in shares of its meeting dimension, one after another.

Public per-PE functions, of tiles. A share is the same part of every tile, not some tiles: it costs
no more words than all at once, and each round holds that much less.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.axes import COLS, ROWS
from wsekern.kernels import tile_product as tile


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable, rounds: int) -> jax.Array:
    """S = X @ Y, in float32: the sum of `inner` of each share."""
    shares = cut_columns(a, rounds), cut_rows(b, rounds)

    def step(c, share):
        return c + inner(*share, shape), None

    first, others = ([x[part] for x in shares] for part in (0, slice(1, None)))
    return lax.scan(step, inner(*first, shape), tuple(others))[0]


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable, rounds: int) -> jax.Array:
    """X = S @ Y^T, in float32: a share of X from each of Y."""
    part = (*shape[:-1], shape[-1] // rounds)
    shares = lax.map(lambda share: inner(a, share, part), cut_rows(b, rounds))
    return joined_columns(shares)


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable, rounds: int) -> jax.Array:
    """Y = X^T @ S, in float32: a share of Y from each of X."""
    part = (*shape[:-2], shape[-2] // rounds, shape[-1])
    shares = lax.map(lambda share: inner(share, b, part), cut_columns(a, rounds))
    return joined_rows(shares)


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
