"""Causal attention in zig-zag order, which gives every PE the same work.

Public per-PE functions. W. Brandon et al., "Striped Attention: Faster Ring Attention for Causal
Transformers", 2023, name the imbalance of the plain ring. The sequence is cut into 2p chunks, and
PE i of p, whose tile is chunks 2i and 2i+1, keeps the first and exchanges the second with PE p-1-i.
The two chunks of a PE are then equally far from the two ends of the sequence. On 4 PEs:

    PE       0     1     2     3
    tiles    0 1   2 3   4 5   6 7
    zig-zag  0 7   2 5   4 3   6 1

In the ring, a PE's early and late chunk and those of a visitor make four pairs. Of these, whoever
the visitor is, the causal mask hides two completely and leaves two completely visible:

    PE 1 (2 5) meets 0 7, whose early chunk is before its own:  2 sees 0,  5 sees 0
    PE 1 (2 5) meets 3 4, whose early chunk is behind its own:  5 sees 3,  5 sees 4
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from wsekern import fabric
from wsekern.kernels.attention import ring, tile, vendor
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.ring import Distance
from wsekern.kernels.attention.tile_gradients import Gradients
from wsekern.wafer.axes import ROWS

EARLY, LATE = 0, 1

Tree = TypeVar("Tree")
Chunk = Int[Array, ""] | int  # EARLY or LATE; traced where it depends on the PE


def exchange(tiles: Tree, axis: int) -> Tree:
    """Tiles with the second half along `axis` exchanged for that of PE p-1-i; its own inverse.

    A route of half a tile.
    """

    def second_half(t: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return lax.slice_in_dim(t, t.shape[axis] // 2, t.shape[axis], axis=axis)

    def put(t: Shaped[Array, "..."], half: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return lax.dynamic_update_slice_in_dim(t, half, t.shape[axis] // 2, axis)

    return jax.tree.map(put, tiles, _exchange_half(jax.tree.map(second_half, tiles)))


def starts(rows: int) -> Int[Array, " 2"]:
    """The positions at which the two halves of an exchanged tile of `rows` rows begin."""
    place, p = fabric.axis_index(ROWS), fabric.axis_size(ROWS)
    return jnp.stack([2 * place, 2 * (p - 1 - place) + 1]) * (rows // 2)


def to_zigzag(tiles: Tree) -> Tree:
    """From tiles `[B, Tt, ...]` in the order of the sequence to this PE's early and late chunk."""
    kept, received = _half(tiles, 0), _exchange_half(_half(tiles, 1))
    keeps = _keeps_early()
    return _concatenate(_where(keeps, kept, received), _where(keeps, received, kept))


def from_zigzag(tiles: Tree) -> Tree:
    """The inverse of `to_zigzag`, at the same cost."""
    early, late = _half(tiles, EARLY), _half(tiles, LATE)
    keeps = _keeps_early()
    kept, received = _where(keeps, early, late), _where(keeps, late, early)
    return _concatenate(kept, _exchange_half(received))


def zigzag_attention(rows: Rows, keys: Keys, rule: Rule) -> tile.RunningSoftmax:
    """The softmax over all keys along y, in p - 1 shifts.

    The first half of the blocks is the early chunk.
    """
    rows, keys = _split_chunks(rows), _split_chunks(keys)

    def absorb(
        running: tile.RunningSoftmax,
        queries: Chunk,
        visitor: Chunk,
        keys: Keys,
        kind: vendor.TileKind,
    ) -> tile.RunningSoftmax:
        chunks = _chunk(running, queries), _chunk(rows, queries), _chunk(keys, visitor)
        return _put(running, vendor.absorb(*chunks, rule, kind), queries)

    def first(running: tile.RunningSoftmax, keys: Keys, _: Distance) -> tile.RunningSoftmax:
        # A PE's own tile: all of the early chunk lies before the late one.
        running = absorb(running, EARLY, EARLY, keys, "diagonal")
        running = absorb(running, LATE, EARLY, keys, "full")
        return absorb(running, LATE, LATE, keys, "diagonal")

    def visit(running: tile.RunningSoftmax, keys: Keys, distance: Distance) -> tile.RunningSoftmax:
        running = absorb(running, LATE, EARLY, keys, "full")
        chunk = _second_pair(distance)
        return absorb(running, chunk, chunk, keys, "full")

    running = _split_chunks(tile.empty_softmax(_join_chunks(rows.q)))
    return _join_chunks(ring.travel(first, visit, running, keys, fabric.axis_size(ROWS)))


def zigzag_gradients(rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """Gradients of queries, and of keys and values, in float32.

    p - 1 shifts of keys and values, and p of their gradient.
    """
    sums = _split_chunks(vendor.zero_gradients(rows, keys, rule))
    rows, keys = _split_chunks(rows), _split_chunks(keys)

    def add(
        sums: Gradients, queries: Chunk, visitor: Chunk, keys: Keys, kind: vendor.TileKind
    ) -> Gradients:
        dq, dkv, _ = sums
        of_chunks = Gradients(_chunk(dq, queries), _chunk(dkv, visitor), None)
        operands = _chunk(rows, queries), _chunk(keys, visitor)
        of_chunks = vendor.add_gradients(of_chunks, *operands, rule, kind)
        return Gradients(_put(dq, of_chunks.dq, queries), _put(dkv, of_chunks.dkv, visitor), None)

    def first(sums: Gradients, keys: Keys, _: Distance) -> Gradients:
        sums = add(sums, EARLY, EARLY, keys, "diagonal")
        sums = add(sums, LATE, EARLY, keys, "full")
        return add(sums, LATE, LATE, keys, "diagonal")

    def visit(sums: Gradients, keys: Keys, distance: Distance) -> Gradients:
        # Every visible pair is visible completely: no mask, and no positions needed.
        sums = add(sums, LATE, EARLY, keys, "full")
        chunk = _second_pair(distance)
        return add(sums, chunk, chunk, keys, "full")

    sums = ring.travel_with_gradients(first, visit, sums, keys, fabric.axis_size(ROWS))
    return _join_chunks(sums)


def _second_pair(distance: Distance) -> Int[Array, ""]:
    """The chunk, of this PE and of the visitor, that makes the second visible pair.

    Late queries see any visitor's early keys: that is the first pair. The second one is early with
    early for a visitor whose early chunk is before this PE's, else late with late.
    """
    place, p = fabric.axis_index(ROWS), fabric.axis_size(ROWS)

    def early_chunk(place: Int[Array, ""]) -> Int[Array, ""]:
        return jnp.minimum(2 * place, 2 * (p - 1 - place) + 1)

    before = early_chunk((place - distance) % p) < early_chunk(place)
    return jnp.where(before, EARLY, LATE)


def _keeps_early() -> Bool[Array, ""]:
    """Whether the chunk that a PE keeps is its early one."""
    return 2 * fabric.axis_index(ROWS) < fabric.axis_size(ROWS)


def _exchange_half(half: Tree) -> Tree:
    p = fabric.axis_size(ROWS)
    return fabric.route(half, ROWS, [(i, p - 1 - i) for i in range(p)])


def _split_chunks(tree: Tree) -> Tree:
    """Blocks `[2n, ...]` as chunks `[2, n, ...]`; positions then count from each chunk's start.

    Positions in the sequence are not needed: a pair of chunks is a diagonal, or is seen completely.
    """
    chunks: Any = jax.tree.map(lambda t: t.reshape(2, t.shape[0] // 2, *t.shape[1:]), tree)
    if not isinstance(tree, Rows | Keys):
        return chunks
    blocks = chunks.q if isinstance(tree, Rows) else chunks.kv
    start = jnp.arange(blocks.shape[1]) * blocks.shape[-2]
    return chunks._replace(start=jnp.stack([start, start]))


def _join_chunks(tree: Tree) -> Tree:
    return jax.tree.map(lambda t: t.reshape(-1, *t.shape[2:]), tree)


def _chunk(tree: Tree, chunk: Chunk) -> Tree:
    if isinstance(chunk, int):  # known: a static slice
        return jax.tree.map(lambda t: t[chunk], tree)
    return jax.tree.map(lambda t: lax.dynamic_index_in_dim(t, chunk, keepdims=False), tree)


def _put(tree: Tree, new: Tree, chunk: Chunk) -> Tree:
    return jax.tree.map(lambda t, n: lax.dynamic_update_index_in_dim(t, n, chunk, 0), tree, new)


def _half(tiles: Tree, half: int) -> Tree:
    """The first or the second half of the rows of each tile."""

    def cut(t: Shaped[Array, "B Tt ..."]) -> Shaped[Array, "B _ ..."]:
        length = t.shape[1] // 2
        return t[:, half * length : (half + 1) * length]

    return jax.tree.map(cut, tiles)


def _where(condition: Bool[Array, ""], a: Tree, b: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _concatenate(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], 1), a, b)
