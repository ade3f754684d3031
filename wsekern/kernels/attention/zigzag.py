"""This file is causal ring attention in zig-zag order, in which every PE has the same work.

Public per-PE functions. W. Brandon et al., "Striped Attention: Faster Ring Attention for Causal
Transformers", 2023, name the imbalance of the plain ring; the order here is that of the public
zig-zag ring kernels: the sequence is cut into 2p chunks, and PE i of p holds chunks i and 2p-1-i.
Then of any two other PEs' four pairs of chunks exactly two are seen, and both wholly.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.attention import ring, tile, tile_gradients, vendor
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients
from wsekern.wafer.axes import ROWS


def dealt(x: Any) -> Any:
    """Tiles `[B, Tt, ...]` of whole rows in order, as this PE's early chunk and its late one.

    Two routes of half a tile each, in one step: of a tile's chunks 2i and 2i+1 the PE at i is to
    send one to an even place and one to an odd one.
    """
    first = fabric.route(jax.tree.map(lambda t: _half(t, 0), x), ROWS, _pairs(0))
    second = fabric.route(jax.tree.map(lambda t: _half(t, 1), x), ROWS, _pairs(1))
    even = fabric.axis_index(ROWS) % 2 == 0
    early = jax.tree.map(lambda a, b: jnp.where(even, a, b), first, second)
    late = jax.tree.map(lambda a, b: jnp.where(even, b, a), first, second)
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), early, late)


def in_order(x: Any) -> Any:
    """The inverse of `dealt`, at the same cost."""
    even = fabric.axis_index(ROWS) % 2 == 0
    early, late = (jax.tree.map(lambda t, h=h: _half(t, h), x) for h in (0, 1))
    first = jax.tree.map(lambda a, b: jnp.where(even, a, b), early, late)
    second = jax.tree.map(lambda a, b: jnp.where(even, b, a), early, late)
    first = fabric.route(first, ROWS, [(b, a) for a, b in _pairs(0)])
    second = fabric.route(second, ROWS, [(b, a) for a, b in _pairs(1)])
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), first, second)


def zigzag_attention(rows: Rows, keys: Keys, rule: Rule) -> tile.Running:
    """The softmax over all keys along y, in p - 1 shifts; the first half of the blocks is early."""
    rows, keys = _parts(rows), _parts(keys)

    def absorb(running, r, k, keys, kind):
        mine = vendor.absorb(_at(running, r), _at(rows, r), _at(keys, k), rule, kind)
        return _put(running, mine, r)

    def own(running, keys, _):
        running = absorb(running, 0, 0, keys, "diagonal")
        running = absorb(running, 1, 0, keys, "full")
        return absorb(running, 1, 1, keys, "diagonal")

    def visit(running, keys, back):
        running = absorb(running, 1, 0, keys, "full")
        other = _other(back)
        return absorb(running, other, other, keys, "full")

    running = _parts(tile.nothing_yet(_joined(rows.q)))
    return _joined(ring.travel(own, visit, running, keys, fabric.axis_size(ROWS)))


def zigzag_gradients(rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """Gradients of queries, and of keys and values, in float32.

    p - 1 shifts of keys and values, and p of their gradient.
    """
    so_far = _parts(tile_gradients.nothing_yet(rows, keys))
    rows, keys = _parts(rows), _parts(keys)

    def add(so_far, r, k, keys, rule):
        dq, dkv, _ = so_far
        part = Gradients(_at(dq, r), _at(dkv, k), None)
        part = tile_gradients.add(part, _at(rows, r), _at(keys, k), rule)
        return Gradients(_put(dq, part.dq, r), _put(dkv, part.dkv, k), None)

    def own(so_far, keys, _):
        so_far = add(so_far, 0, 0, keys, rule)
        so_far = add(so_far, 1, 0, keys, rule.everywhere())
        return add(so_far, 1, 1, keys, rule)

    def visit(so_far, keys, back):
        so_far = add(so_far, 1, 0, keys, rule.everywhere())
        other = _other(back)
        return add(so_far, other, other, keys, rule.everywhere())

    return _joined(ring.travel_back(own, visit, so_far, keys, fabric.axis_size(ROWS)))


def _other(back: jax.Array | int) -> jax.Array:
    """Of which of its own chunks, and of the visitor's, a PE computes the second pair.

    The late queries see all early keys. A visitor from before brings its early keys to the early
    queries too, one from behind its late keys to the late queries.
    """
    return jnp.where(fabric.axis_index(ROWS) >= back, 0, 1)


def _parts(x: Any) -> Any:
    """Blocks `[2n, ...]` as `[2, n, ...]`; positions count from the start of each chunk."""
    parted = jax.tree.map(lambda t: t.reshape(2, t.shape[0] // 2, *t.shape[1:]), x)
    if not isinstance(x, Rows | Keys):
        return parted
    blocks = x.q if isinstance(x, Rows) else x.kv
    start = jnp.arange(blocks.shape[0] // 2) * blocks.shape[-2]
    return parted._replace(start=jnp.stack([start, start]))


def _joined(x: Any) -> Any:
    return jax.tree.map(lambda t: t.reshape(-1, *t.shape[2:]), x)


def _at(x: Any, part: jax.Array | int) -> Any:
    if isinstance(part, int):
        return jax.tree.map(lambda t: t[part], x)
    return jax.tree.map(lambda t: lax.dynamic_index_in_dim(t, part, keepdims=False), x)


def _put(x: Any, new: Any, part: jax.Array | int) -> Any:
    return jax.tree.map(lambda t, n: lax.dynamic_update_index_in_dim(t, n, part, 0), x, new)


def _half(t: jax.Array, which: int) -> jax.Array:
    half = t.shape[1] // 2
    return t[:, which * half : (which + 1) * half]


def _pairs(which: int) -> list[tuple[int, int]]:
    """From where to where the first or the second chunk of every PE goes."""
    p = fabric.axis_size(ROWS)
    chunks = [2 * i + which for i in range(p)]
    return [(i, c if c < p else 2 * p - 1 - c) for i, c in enumerate(chunks)]
