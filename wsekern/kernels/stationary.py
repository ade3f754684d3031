"""This file is the matrix product of few rows: the large factor stays, rows and results move.

Public per-PE functions, of tiles, where S and X have few rows and Y is large (a weight). R. Pope et
al., "Efficiently Scaling Transformer Inference", 2022, call it weight-stationary. A PE's tile of Y
needs the part of X that meets it, all rows of it, which lies along the other axis: rows are first
gathered along y, then that part is sent along x, as the sum of what each PE there has of it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.axes import COLS, ROWS
from wsekern.kernels import tile_product as tile


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int) -> jax.Array:
    """S = X @ Y, in float32: Y stays, and the sums over y are the last move."""
    met = _met(_all_rows(a, rows), b.shape[-2])
    return _own_rows(tile.product("nn", met, b, len(shape)), shape)


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int) -> jax.Array:
    """X = S @ Y^T, in float32: Y stays, and the moves are those of `nn` backwards."""
    partial = tile.product("nt", _all_rows(a, rows), b, len(shape))
    met = fabric.all_reduce(partial, COLS)
    mine = _overlap(met, shape[-1], fabric.axis_index(COLS), fabric.axis_index(ROWS))
    return _own_rows(mine, shape)


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int) -> jax.Array:
    """Y = X^T @ S, in float32: the rows of both come to it, and nothing is summed."""
    met = _met(_all_rows(a, rows), shape[-2])
    return tile.product("tn", met, _all_rows(b, rows), len(shape))


def _all_rows(x: jax.Array, rows: int) -> jax.Array:
    """All rows along y, without those that are padding."""
    size, length = fabric.axis_size(ROWS), x.shape[-2]
    if 2 * rows > size * length:
        return tile.sized(fabric.all_gather(x, ROWS, -2), -2, rows)
    # So many are padding that the sum of the true ones, each in its place, is less to send.
    return fabric.all_reduce(_placed(x, -2, rows, fabric.axis_index(ROWS) * length), ROWS)


def _own_rows(x: jax.Array, shape: tile.Shape) -> jax.Array:
    """The sum of `x` along y, of which this PE keeps its own rows."""
    size, length = fabric.axis_size(ROWS), shape[-2]
    if 2 * x.shape[-2] > size * length:
        return fabric.reduce_scatter(tile.sized(x, -2, size * length), ROWS, -2)
    whole = fabric.all_reduce(x, ROWS)
    return _placed(whole, -2, length, -fabric.axis_index(ROWS) * length)


def _met(x: jax.Array, length: int) -> jax.Array:
    """The columns that meet this PE's `length` rows of Y."""
    mine = _overlap(x, length, fabric.axis_index(ROWS), fabric.axis_index(COLS))
    return fabric.all_reduce(mine, COLS)


def _overlap(x: jax.Array, length: int, to: jax.Array, source: jax.Array) -> jax.Array:
    """Part number `to` of a dimension, `length` long, as far as `x`, part `source`, has of it."""
    return _placed(x, -1, length, source * x.shape[-1] - to * length)


def _placed(x: jax.Array, axis: int, length: int, start: jax.Array) -> jax.Array:
    """`length` zeros, with `x` from place `start` on as far as it lies within them."""
    axis %= x.ndim
    around = [(length, length) if d == axis else (0, 0) for d in range(x.ndim)]
    at = jnp.clip(length - start, 0, length + x.shape[axis])
    return lax.dynamic_slice_in_dim(jnp.pad(x, around), at, length, axis)
