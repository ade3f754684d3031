"""This file is the matrix product of few rows: the large factor stays, rows and results move.

Public per-PE functions, of tiles, where S and X have few rows and Y is large (a weight). R. Pope et
al., "Efficiently Scaling Transformer Inference", 2022, call it weight-stationary. A PE's tile of Y
needs the part of X that meets it, all rows of it, which lies along the other axis: rows are first
gathered along y, then that part is flooded along x, as far as each PE there has it. On a square
grid tiles can be turned about its diagonal first, and rows gathered along x instead (`turned`).
Many rows go in rounds, each of the same share of every tile's rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.matmul import panels, tile
from wsekern.wafer.axes import COLS, ROWS


def nn(
    a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int, rounds: int = 1, turned: bool = False
) -> jax.Array:
    """S = X @ Y, in float32: Y stays, and the sums over y are the last move."""

    def run(a, shape, rows):
        met = _met_rows(a, rows, b.shape[-2], turned)
        return _own_rows(tile.product("nn", met, b, len(shape)), shape)

    return _by_rows(run, a, shape, rows, rounds)


def nt(
    a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int, rounds: int = 1, turned: bool = False
) -> jax.Array:
    """X = S @ Y^T, in float32: Y stays, and the moves are those of `nn` backwards."""

    def run(a, shape, rows):
        partial = tile.product("nt", _all_rows(a, rows), b, len(shape))
        if turned:
            return fabric.transpose(_own_rows(partial, shape, COLS))
        met = fabric.all_reduce(partial, COLS)
        start = fabric.axis_index(COLS) * shape[-1] - fabric.axis_index(ROWS) * met.shape[-1]
        return _own_rows(panels.overlap(met, -1, start, shape[-1]), shape)

    return _by_rows(run, a, shape, rows, rounds)


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, rows: int, turned: bool = False) -> jax.Array:
    """Y = X^T @ S, in float32: the rows of both come to it, and nothing is summed.

    In rounds it would be a sum over them: SUMMA, which keeps no more, is faster then.
    """
    met = _met_rows(a, rows, shape[-2], turned)
    return tile.product("tn", met, _all_rows(b, rows), len(shape))


def _by_rows(run, a, shape, rows, rounds):
    if rounds == 1:
        return run(a, shape, rows)
    shape = (*shape[:-2], shape[-2] // rounds, shape[-1])
    rows = fabric.axis_size(ROWS) * shape[-2]
    parts = jnp.moveaxis(lax.map(lambda part: run(part, shape, rows), _cut(a, rounds)), 0, -3)
    return jnp.reshape(parts, (*parts.shape[:-3], -1, parts.shape[-1]))


def _cut(x, rounds):
    return jnp.moveaxis(jnp.reshape(x, (*x.shape[:-2], rounds, -1, x.shape[-1])), -3, 0)


def _met_rows(x: jax.Array, rows: int, length: int, turned: bool) -> jax.Array:
    """All rows, and the columns that meet this PE's `length` rows of Y."""
    if turned:
        return _all_rows(fabric.transpose(x), rows, COLS)
    x = _all_rows(x, rows)
    start = fabric.axis_index(ROWS) * length - fabric.axis_index(COLS) * x.shape[-1]
    return fabric.flood(panels.overlap(x, -1, start, length), COLS)


def _all_rows(x: jax.Array, rows: int, along: str = ROWS) -> jax.Array:
    """All rows along an axis, without those that are padding."""
    size, length = fabric.axis_size(along), x.shape[-2]
    if 2 * rows > size * length:
        return tile.sized(fabric.all_gather(x, along, -2), -2, rows)
    # So many are padding that a flood of the true ones, each in its place, is less to send.
    return fabric.flood(panels.overlap(x, -2, -fabric.axis_index(along) * length, rows), along)


def _own_rows(x: jax.Array, shape: tile.Shape, along: str = ROWS) -> jax.Array:
    """The sum of `x` along an axis, of which this PE keeps its own rows."""
    size, length = fabric.axis_size(along), shape[-2]
    if 2 * x.shape[-2] > size * length:
        return fabric.reduce_scatter(tile.sized(x, -2, size * length), along, -2)
    whole = fabric.all_reduce(x, along)
    return panels.overlap(whole, -2, fabric.axis_index(along) * length, length)
