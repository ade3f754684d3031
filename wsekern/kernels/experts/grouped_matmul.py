"""Products of sorted rows with one weight for each group of rows.

T. Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022, for products
by blocks of rows that drop none. Here rows are sorted by group. A loop over the groups that have
rows reads each one's weight once, and multiplies its rows a block at a time. (XLA's `ragged_dot`
multiplies every row by every group's weight; by the cycles of its compiler on TPUs too.) Nothing is
padded: the last block of a group may run on into the next group, which then overwrites those rows.
For blocks of 4 rows and groups of 3 and 6:

    rows        0 1 2 | 3 4 5 6 7 8
    group 0     0 1 2   3
    group 1             3 4 5 6 7 8 9 10
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern import fabric
from wsekern.wafer import layout
from wsekern.wafer.limits import widen_for_backend

_MIN_BLOCK, _MAX_BLOCK = 8, 128  # rows

_Matrices = tuple[Float[Array, "_ _"], ...]
_Weights = tuple[Float[Array, "G _ _"], ...]  # a matrix for each group
_Products = tuple[Float[Array, "K N"], ...]
_Gradients = tuple[Float[Array, "G K N"], ...]


class Groups(NamedTuple):
    """The order of rows sorted by group. R rows, G groups."""

    order: Int[Array, " R"]  # the row at each place
    place: Int[Array, " R"]  # the place of each row
    counts: Int[Array, " G"]  # rows of each group
    starts: Int[Array, " G"]  # place of each group's first row
    nonempty: Int[Array, " G"]  # the groups that have rows, in order, then the others

    def select(self, first: Int[Array, ""] | int, groups: int) -> Groups:
        """`groups` of them, from `first` on. The rows of other groups then have no group."""
        counts = lax.dynamic_slice_in_dim(self.counts, first, groups)
        starts = lax.dynamic_slice_in_dim(self.starts, first, groups)
        return self._replace(counts=counts, starts=starts, nonempty=_nonempty_first(counts))

    def has_group(self) -> Bool[Array, " R"]:
        """Whether the row at each place has a group."""
        places = jnp.arange(len(self.order))
        return (places >= self.starts[0]) & (places < self.starts[-1] + self.counts[-1])

    def group_of_rows(self) -> Int[Array, " R"]:
        """The group of the row at each place; any valid number for a row without one."""
        places = jnp.arange(len(self.order))
        group = jnp.searchsorted(self.starts + self.counts, places, side="right")
        return jnp.minimum(group, len(self.counts) - 1)


def sort_by_group(group: Int[Array, " R"], groups: int) -> Groups:
    """The order of rows by their group. Rows without one, numbered `groups` or more, come last."""
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(group), dtype=jnp.int32))
    counts = jnp.zeros(groups, jnp.int32).at[group].add(1, mode="drop")
    starts = jnp.cumsum(counts) - counts
    return Groups(order, place, counts, starts, _nonempty_first(counts))


def _nonempty_first(counts: Int[Array, " G"]) -> Int[Array, " G"]:
    return jnp.argsort(counts == 0, stable=True).astype(jnp.int32)


def product(
    rows: Float[Array, "R K"],
    weights: _Weights,
    groups: Groups,
    *,
    transposed: bool = False,
    precision: lax.PrecisionLike = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[Float[Array, "R _"], ...]:
    """`rows @ weight[group]` for each of `weights`, summed in float32; 0 for rows without a group.

    Args:
      rows: sorted.
      weights: arrays of one matrix for each group, `[G, K, N]`.
      groups: of the rows.
      transposed: whether the weights are `[G, N, K]`.
      precision: of every product.
      dtype: of the results; None: that of the operands.
    """
    R, G = rows.shape[0], len(groups.counts)
    axis = 1 if transposed else 2
    dtypes = [dtype or jnp.promote_types(rows.dtype, w.dtype) for w in weights]
    size = _block_rows(R, G)
    rows = layout.resize(rows, 0, R + size)
    outs = tuple(
        fabric.varying(jnp.zeros((R + size, w.shape[axis]), dtype))
        for w, dtype in zip(weights, dtypes, strict=True)
    )
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))

    def multiply_block(begin: Int[Array, ""], matrices: _Matrices, outs: _Matrices) -> _Matrices:
        block = lax.dynamic_slice_in_dim(rows, begin, size)
        results = (
            lax.dot_general(
                block,
                matrix,
                dimensions,
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for matrix in matrices
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(out, result.astype(out.dtype), begin, 0)
            for out, result in zip(outs, results, strict=True)
        )

    def multiply_group(i: Int[Array, ""], outs: _Matrices) -> _Matrices:
        group = groups.nonempty[i]
        matrices = tuple(w[group] for w in weights)
        start, count = groups.starts[group], groups.counts[group]
        return lax.fori_loop(
            0,
            -(-count // size),
            lambda j, outs: multiply_block(start + j * size, matrices, outs),
            outs,
        )

    outs = lax.fori_loop(0, (groups.counts > 0).sum(), multiply_group, outs)
    return tuple(jnp.where(groups.has_group()[:, None], out[:R], 0) for out in outs)


def weight_gradients(
    lefts: tuple[Float[Array, "R K"], ...],
    rights: tuple[Float[Array, "R N"], ...],
    groups: Groups,
    precision: lax.PrecisionLike = None,
) -> _Gradients:
    """`left[group]^T @ right[group]` for each group and each pair, in float32.

    Args:
      lefts: sorted rows.
      rights: likewise.
      groups: of the rows.
      precision: of every product.
    """
    R, G = lefts[0].shape[0], len(groups.counts)
    size = _block_rows(R, G)
    lefts, rights = (tuple(layout.resize(x, 0, R + size) for x in side) for side in (lefts, rights))
    shapes = [(a.shape[1], b.shape[1]) for a, b in zip(lefts, rights, strict=True)]

    def multiply_block(begin: Int[Array, ""], end: Int[Array, ""]) -> _Products:
        in_group = (begin + jnp.arange(size) < end)[:, None]
        pairs = (
            (lax.dynamic_slice_in_dim(a, begin, size), lax.dynamic_slice_in_dim(b, begin, size))
            for a, b in zip(lefts, rights, strict=True)
        )
        # Both sides: a row of the next group that is not finite would give 0 times NaN.
        return tuple(
            lax.dot_general(
                *widen_for_backend(jnp.where(in_group, a, 0), jnp.where(in_group, b, 0)),
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            for a, b in pairs
        )

    def add_group(i: Int[Array, ""], outs: _Gradients) -> _Gradients:
        group = groups.nonempty[i]
        start, end = groups.starts[group], groups.starts[group] + groups.counts[group]

        def add_block(j: Int[Array, ""], sums: _Products) -> _Products:
            return tuple(map(jnp.add, sums, multiply_block(start + j * size, end)))

        # Begin with the first block's product and not with zeros: most groups have one block.
        blocks = -(-groups.counts[group] // size)
        sums = lax.fori_loop(1, blocks, add_block, multiply_block(start, end))
        return tuple(out.at[group].set(total) for out, total in zip(outs, sums, strict=True))

    zeros = tuple(fabric.varying(jnp.zeros((G, *shape), jnp.float32)) for shape in shapes)
    return lax.fori_loop(0, (groups.counts > 0).sum(), add_group, zeros)


def _block_rows(rows: int, groups: int) -> int:
    """Rows to multiply at once: the average of a group, rounded up to a power of two."""
    size = _MIN_BLOCK
    while size < min(_MAX_BLOCK, -(-rows // groups)):
        size *= 2
    return size
