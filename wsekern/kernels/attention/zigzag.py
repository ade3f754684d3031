"""Causal ring attention in zig-zag order, which gives every PE the same work.

Public per-PE functions. W. Brandon et al., "Striped Attention: Faster Ring Attention for Causal
Transformers", 2023, name the imbalance of the plain ring. The order here is that of the public
zig-zag ring kernels: the sequence is cut into 2p chunks, and PE i of p holds chunks i and 2p-1-i,
its early and its late chunk. On 4 PEs:

    PE       0     1     2     3
    tiles    0 1   2 3   4 5   6 7
    zig-zag  0 7   1 6   2 5   3 4

A PE's two chunks and a visitor's two make four pairs. Of these, whoever the visitor is, the causal
mask hides two completely and leaves two completely visible:

    visitor from before (PE 1 meets 0 7):  1 sees 0,  6 sees 0
    visitor from behind (PE 1 meets 2 5):  6 sees 2,  6 sees 5
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


def to_zigzag(tiles: Tree) -> Tree:
    """From tiles `[B, Tt, ...]` in the order of the sequence to this PE's early and late chunk.

    Two routes of half a tile each, in one step. The first moves the even chunks: the early ones of
    them belong to even places, the late ones to odd places. The second moves the odd chunks, with
    early and late exchanged. So by each route every PE receives one chunk.
    """
    first = fabric.route(_half(tiles, 0), ROWS, _chunk_routes(0))
    second = fabric.route(_half(tiles, 1), ROWS, _chunk_routes(1))
    even = fabric.axis_index(ROWS) % 2 == 0
    return _concatenate(_where(even, first, second), _where(even, second, first))


def from_zigzag(tiles: Tree) -> Tree:
    """The inverse of `to_zigzag`, at the same cost."""
    even = fabric.axis_index(ROWS) % 2 == 0
    early, late = _half(tiles, EARLY), _half(tiles, LATE)
    # Each chunk takes the route back that it came by.
    first, second = _where(even, early, late), _where(even, late, early)
    first = fabric.route(first, ROWS, [(b, a) for a, b in _chunk_routes(0)])
    second = fabric.route(second, ROWS, [(b, a) for a, b in _chunk_routes(1)])
    return _concatenate(first, second)


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
    early for a visitor from before, late with late for one from behind.
    """
    return jnp.where(fabric.axis_index(ROWS) >= distance, EARLY, LATE)


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


def _chunk_routes(half: int) -> list[tuple[int, int]]:
    """The PE that holds the first or the second chunk of each tile, and the PE that needs it."""
    p = fabric.axis_size(ROWS)
    chunks = [2 * i + half for i in range(p)]
    return [(i, c if c < p else 2 * p - 1 - c) for i, c in enumerate(chunks)]
