"""This file is attention with the sequence in a ring: keys and values travel, queries stay.

Public per-PE functions. H. Liu, M. Zaharia and P. Abbeel, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", 2023. Every step sends one tile to the next PE along y, and
the tile that a PE computes with meanwhile has arrived the step before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.attention import tile, tile_gradients, vendor
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients
from wsekern.wafer.axes import ROWS


def ring_attention(rows: Rows, keys: Keys, rule: Rule, tiles: int) -> tile.Running:
    """The softmax over the keys of `tiles` PEs along y: this one's and those before it in the ring.

    `tiles - 1` shifts of a tile of keys and values, each a step; two such tiles are held at once.
    """

    def visit(running, keys, back):
        keys = _placed(keys, back)
        return vendor.absorb(running, rows, keys, rule, "any" if rule.bounded else "full")

    return travel(visit, visit, tile.nothing_yet(rows.q), keys, tiles)


def ring_gradients(rows: Rows, keys: Keys, rule: Rule, tiles: int) -> Gradients:
    """Gradients of queries, and of keys and values, in float32.

    `tiles - 1` shifts of keys and values, and `tiles` of their gradient, which follows them and is
    sent home by the last.
    """

    def visit(so_far, keys, back):
        return tile_gradients.add(so_far, rows, _placed(keys, back), rule)

    return travel_back(visit, visit, tile_gradients.nothing_yet(rows, keys), keys, tiles)


def travel(own: Callable, visit: Callable, running: Any, keys: Keys, tiles: int) -> Any:
    """What has met the keys of `tiles` PEs: `own(running, keys, 0)`, then `visit(..., back)`.

    Each of them has come `back` places down the ring.
    """
    coming = _shift(keys) if tiles > 1 else keys
    running = own(running, keys, 0)
    if tiles == 1:
        return running

    def step(carry, back):
        running, keys = carry
        coming = _shift(keys)
        return (visit(running, keys, back), coming), None

    # The last tile is met outside the loop, where it need not travel on.
    carry, _ = lax.scan(step, (running, coming), jnp.arange(1, tiles - 1))
    return visit(*carry, tiles - 1)


def travel_back(
    own: Callable, visit: Callable, so_far: Gradients, keys: Keys, tiles: int
) -> Gradients:
    """As `travel`, for gradients: that of a tile of keys is where the tile is, and ends at home."""
    coming = _shift(keys) if tiles > 1 else keys
    so_far = own(so_far, keys, 0)
    if tiles == 1:
        return so_far

    def step(carry, back):
        so_far, keys = carry
        coming = _shift(keys)
        return (visit(_followed(so_far), keys, back), coming), None

    (so_far, keys), _ = lax.scan(step, (so_far, coming), jnp.arange(1, tiles - 1))
    so_far = visit(_followed(so_far), keys, tiles - 1)
    return so_far._replace(dkv=fabric.shift(so_far.dkv, ROWS, 1 - tiles))


def _shift(keys: Keys) -> Keys:
    kv, segments = fabric.shift((keys.kv, keys.segments), ROWS)
    return keys._replace(kv=kv, segments=segments)


def _followed(so_far: Gradients) -> Gradients:
    return so_far._replace(dkv=fabric.shift(so_far.dkv, ROWS))


def _placed(keys: Keys, back: jax.Array | int) -> Keys:
    place = (fabric.axis_index(ROWS) - back) % fabric.axis_size(ROWS)
    return keys._replace(start=tile.starts(keys.kv, place))
