"""This file is products of rows with the weight of the group that each belongs to.

T. Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022, for products
by blocks of rows that drop none. Here rows are sorted by group; a loop over the groups that have
any takes each one's weight once and its rows a block at a time. A block that is too long for its
group runs on into the next, which writes its own rows over it: nothing is padded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern import fabric

_LEAST, _MOST = 8, 128  # rows of a block


class Groups(NamedTuple):
    """Rows sorted by group: what stands where."""

    order: Int[Array, "R"]  # the row that stands at each place
    place: Int[Array, "R"]  # where each row stands
    counts: Int[Array, "G"]  # rows of each group
    starts: Int[Array, "G"]  # the place of its first
    used: Int[Array, "G"]  # the groups that have rows, in order, and then the others

    def part(self, first: int | jax.Array, groups: int) -> "Groups":
        """`groups` of them from `first` on: the rows of the others are of no group then."""
        counts = lax.dynamic_slice_in_dim(self.counts, first, groups)
        starts = lax.dynamic_slice_in_dim(self.starts, first, groups)
        return self._replace(counts=counts, starts=starts, used=_used(counts))

    def have(self) -> Bool[Array, "R"]:
        """Whether the row at a place is of a group."""
        places = jnp.arange(len(self.order))
        return (places >= self.starts[0]) & (places < self.starts[-1] + self.counts[-1])

    def of_rows(self) -> Int[Array, "R"]:
        """The group of the row at each place; of rows without one, some group."""
        places = jnp.arange(len(self.order))
        found = jnp.searchsorted(self.starts + self.counts, places, side="right")
        return jnp.minimum(found, len(self.counts) - 1)


def sort(group: Int[Array, "R"], groups: int) -> Groups:
    """The order of rows by their group; those of no group, `groups` or more, come last."""
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(len(group), dtype=jnp.int32))
    counts = jnp.zeros(groups, jnp.int32).at[group].add(1, mode="drop")
    starts = jnp.cumsum(counts) - counts
    return Groups(order, place, counts, starts, _used(counts))


def _used(counts):
    return jnp.argsort(counts == 0, stable=True).astype(jnp.int32)


def product(
    rows: Float[Array, "R K"],
    weights: tuple[Float[Array, "G _ _"], ...],
    groups: Groups,
    *,
    transposed: bool = False,
) -> tuple[Float[Array, "R N"], ...]:
    """`rows @ weight[group]` for each of `weights`, summed in float32; zeros for rows of no group.

    Args:
      rows: sorted.
      weights: one matrix a group, `[G, K, N]`, which share their left factor.
      groups: of the rows.
      transposed: whether the weights are `[G, N, K]`.
    """
    R, G = rows.shape[0], len(groups.counts)
    axis = 1 if transposed else 2
    dtypes = [jnp.promote_types(rows.dtype, w.dtype) for w in weights]
    if _grouped_kernel():
        turned = (jnp.swapaxes(w, 1, 2) if transposed else w for w in weights)
        return tuple(
            lax.ragged_dot(rows, w, groups.counts, preferred_element_type=jnp.float32).astype(t)
            for w, t in zip(turned, dtypes, strict=True)
        )
    size = _block(R, G)
    rows = jnp.pad(rows, ((0, size), (0, 0)))
    outs = tuple(
        fabric.varying(jnp.zeros((R + size, w.shape[axis]), t))
        for w, t in zip(weights, dtypes, strict=True)
    )
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))

    def block(at, mine, outs):
        tile = lax.dynamic_slice_in_dim(rows, at, size)
        made = (
            lax.dot_general(tile, w, dimensions, preferred_element_type=jnp.float32) for w in mine
        )
        return tuple(
            lax.dynamic_update_slice_in_dim(out, value.astype(out.dtype), at, 0)
            for out, value in zip(outs, made, strict=True)
        )

    def group(i, outs):
        which = groups.used[i]
        mine = tuple(w[which] for w in weights)
        start, count = groups.starts[which], groups.counts[which]
        return lax.fori_loop(
            0, -(-count // size), lambda j, outs: block(start + j * size, mine, outs), outs
        )

    outs = lax.fori_loop(0, (groups.counts > 0).sum(), group, outs)
    return tuple(jnp.where(groups.have()[:, None], out[:R], 0) for out in outs)


def gradient(
    lefts: tuple[Float[Array, "R K"], ...], rights: tuple[Float[Array, "R N"], ...], groups: Groups
) -> tuple[Float[Array, "G K N"], ...]:
    """`left[group]^T @ right[group]` for each group and each pair, in float32.

    Args:
      lefts: sorted rows.
      rights: likewise.
      groups: of the rows.
    """
    R, G = lefts[0].shape[0], len(groups.counts)
    size = _block(R, G)
    lefts, rights = (
        tuple(jnp.pad(x, ((0, size), (0, 0))) for x in side) for side in (lefts, rights)
    )
    sizes = [(a.shape[1], b.shape[1]) for a, b in zip(lefts, rights, strict=True)]

    def block(at, end):
        mine = (at + jnp.arange(size) < end)[:, None]
        pairs = (
            (lax.dynamic_slice_in_dim(a, at, size), lax.dynamic_slice_in_dim(b, at, size))
            for a, b in zip(lefts, rights, strict=True)
        )
        return tuple(
            lax.dot_general(
                jnp.where(mine, a, 0),
                b,
                (((0,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            for a, b in pairs
        )

    def group(i, outs):
        which = groups.used[i]
        start, end = groups.starts[which], groups.starts[which] + groups.counts[which]

        def add(j, sums):
            return tuple(map(jnp.add, sums, block(start + j * size, end)))

        # The first block's is not added to zeros: most groups have no other.
        sums = lax.fori_loop(1, -(-groups.counts[which] // size), add, block(start, end))
        return tuple(out.at[which].set(total) for out, total in zip(outs, sums, strict=True))

    zeros = tuple(fabric.varying(jnp.zeros((G, *shape), jnp.float32)) for shape in sizes)
    return lax.fori_loop(0, (groups.counts > 0).sum(), group, zeros)


def _block(rows: int, groups: int) -> int:
    """How many rows are multiplied at once: as many as a group has on average, or a few more."""
    size = _LEAST
    while size < min(_MOST, -(-rows // groups)):
        size *= 2
    return size


def _grouped_kernel() -> bool:
    # Elsewhere XLA multiplies every row by every group's weight.
    return jax.default_backend() == "tpu"
