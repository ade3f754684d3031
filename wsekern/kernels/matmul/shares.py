"""Equal shares of the meeting dimension of a matrix product.

Public per-PE functions, of tiles. A share is the same part of every tile, not some of the tiles, so
that multiplying a share moves only that share's words.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from wsekern import fabric
from wsekern.wafer.axes import COLS, ROWS


def split_columns(x: Shaped[Array, "..."], shares: int) -> Shaped[Array, "{shares} ..."]:
    """The tile's shares of its last dimension."""
    return _split(x, -1, _blocks(COLS), shares)


def split_rows(y: Shaped[Array, "..."], shares: int) -> Shaped[Array, "{shares} ..."]:
    """The tile's shares of its last dimension but one."""
    return _split(y, -2, _blocks(ROWS), shares)


def join_columns(shares: Shaped[Array, "shares ..."]) -> Shaped[Array, "..."]:
    """The inverse of `split_columns`."""
    return _join(shares, -1, _blocks(COLS))


def join_rows(shares: Shaped[Array, "shares ..."]) -> Shaped[Array, "..."]:
    """The inverse of `split_rows`."""
    return _join(shares, -2, _blocks(ROWS))


def take(
    x: Shaped[Array, "..."], axis: int, along: str, i: Int[Array, ""] | int, shares: int
) -> Shaped[Array, "..."]:
    """Share number `i` of the tile's `axis`, which is the meeting dimension and lies `along`."""
    axis, blocks = axis % x.ndim, _blocks(along)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = jnp.reshape(x, (*before, blocks, shares, -1, *after))
    share = lax.dynamic_index_in_dim(split, i, axis + 1, keepdims=False)
    return jnp.reshape(share, (*before, -1, *after))


def put(
    x: Shaped[Array, "..."],
    share: Shaped[Array, "..."],
    axis: int,
    along: str,
    i: Int[Array, ""] | int,
    shares: int,
) -> Shaped[Array, "..."]:
    """`x` with its share number `i` replaced; the counterpart of `take`."""
    axis, blocks = axis % x.ndim, _blocks(along)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = jnp.reshape(x, (*before, blocks, shares, -1, *after))
    new = jnp.reshape(share, (*before, blocks, 1, -1, *after))
    return jnp.reshape(lax.dynamic_update_slice_in_dim(split, new, i, axis + 1), x.shape)


def _blocks(along: str) -> int:
    # The meeting dimension lies along x in one operand and along y in the other. A share must be
    # the same places in both, so it is taken from blocks that neither side of the grid cuts: on a
    # 2 x 4 grid from four blocks, of which a tile of X has one and a tile of Y has two.
    size = fabric.axis_size(along)
    return math.lcm(fabric.axis_size(ROWS), fabric.axis_size(COLS)) // size


def _split(
    x: Shaped[Array, "..."], axis: int, blocks: int, shares: int
) -> Shaped[Array, "{shares} ..."]:
    axis %= x.ndim
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    split = jnp.moveaxis(jnp.reshape(x, (*before, blocks, shares, -1, *after)), axis + 1, 0)
    return jnp.reshape(split, (shares, *before, -1, *after))


def _join(shares: Shaped[Array, "shares ..."], axis: int, blocks: int) -> Shaped[Array, "..."]:
    axis %= shares.ndim - 1
    before, after = shares.shape[1 : axis + 1], shares.shape[axis + 2 :]
    split = jnp.reshape(shares, (shares.shape[0], *before, blocks, -1, *after))
    return jnp.reshape(jnp.moveaxis(split, 0, axis + 1), (*before, -1, *after))
