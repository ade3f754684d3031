"""This file is the matrix product by gathering both operands, and when gathering is worth it.

Public per-PE functions, of tiles. R. C. Agarwal, F. G. Gustavson and M. Zubair, "A high-performance
matrix-multiplication algorithm on a distributed-memory parallel computer, using overlapped
communication", 1994, gather whole blocks as here. As few collectives as there can be, at the price
of memory: a PE holds a row of X's tiles and a column of Y's.
"""

import jax
import jax.numpy as jnp

from wsekern import fabric
from wsekern.kernels.matmul import tile
from wsekern.wafer.axes import COLS, ROWS

# XLA for the CPU joins tiles along their last dimension about six times faster by `concatenate`
# than in an all_gather; of more tiles than this the program would grow too long.
_JOINED = 16


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """S = X @ Y, in float32: two gathers and one product."""
    a, b = columns(a), fabric.all_gather(b, ROWS, -2)
    # Each is padded with zeros for its own side of the grid: what one has more meets nothing.
    K = min(a.shape[-1], b.shape[-2])
    return tile.product("nn", tile.sized(a, -1, K), tile.sized(b, -2, K), len(shape))


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """X = S @ Y^T, in float32: a gather, a product, and a sum of which a PE keeps its own part."""
    partial = tile.product("nt", a, fabric.all_gather(b, ROWS, -2), len(shape))
    return scattered_columns(tile.sized(partial, -1, shape[-1] * fabric.axis_size(COLS)))


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """Y = X^T @ S, in float32: a gather, a product, and a sum of which a PE keeps its own part."""
    partial = tile.product("tn", columns(a), b, len(shape))
    return fabric.reduce_scatter(
        tile.sized(partial, -2, shape[-2] * fabric.axis_size(ROWS)), ROWS, -2
    )


def columns(x: jax.Array) -> jax.Array:
    """All tiles along x, joined along their last dimension."""
    size = fabric.axis_size(COLS)
    if size > _JOINED:
        return fabric.all_gather(x, COLS, -1)
    tiles = fabric.all_gather(x[None], COLS, 0)
    return jnp.concatenate([tiles[i] for i in range(size)], -1)


def scattered_columns(x: jax.Array) -> jax.Array:
    """The sum of `x` along x, of which this PE keeps its own part of the last dimension."""
    size = fabric.axis_size(COLS)
    if size > _JOINED:
        return fabric.reduce_scatter(x, COLS, -1)
    return fabric.reduce_scatter(jnp.stack(jnp.split(x, size, -1)), COLS, 0)[0]
