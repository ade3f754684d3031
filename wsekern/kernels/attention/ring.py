"""Ring attention: keys and values travel round a ring of PEs, queries stay.

Public per-PE functions. H. Liu, M. Zaharia and P. Abbeel, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", 2023. In every step a PE sends the tile of keys that it has
to the next PE along y, and computes with it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from wsekern import fabric
from wsekern.kernels.attention import tile, vendor
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients
from wsekern.wafer.axes import ROWS

Distance = Int[Array, ""] | int  # how many PEs back along the ring a tile of keys started
Carry = TypeVar("Carry")


def ring_attention(rows: Rows, keys: Keys, rule: Rule, tiles: int) -> tile.RunningSoftmax:
    """The softmax over the keys of `tiles` PEs along y: this one and those before it in the ring.

    `tiles - 1` shifts of a tile of keys and values, each one step. A PE holds two of other PEs'
    tiles at a time: one that it computes with, and one that arrives.
    """

    def visit(running: tile.RunningSoftmax, keys: Keys, distance: Distance) -> tile.RunningSoftmax:
        keys = _set_start(keys, distance)
        return vendor.absorb(running, rows, keys, rule, _kind(rule))

    return travel(visit, visit, tile.empty_softmax(rows.q), keys, tiles)


def ring_gradients(rows: Rows, keys: Keys, rule: Rule, tiles: int) -> Gradients:
    """Gradients of queries, and of keys and values, in float32.

    `tiles - 1` shifts of keys and values, and `tiles` of their gradient: it follows its keys round
    the ring, and the last shift sends it home.
    """

    def visit(sums: Gradients, keys: Keys, distance: Distance) -> Gradients:
        keys = _set_start(keys, distance)
        return vendor.add_gradients(sums, rows, keys, rule, _kind(rule))

    sums = vendor.zero_gradients(rows, keys, rule)
    return travel_with_gradients(visit, visit, sums, keys, tiles)


def travel(
    first: Callable[[Carry, Keys, Distance], Carry],
    visit: Callable[[Carry, Keys, Distance], Carry],
    carry: Carry,
    keys: Keys,
    tiles: int,
) -> Carry:
    """`carry` after `first(carry, keys, 0)`, then `visit(carry, keys, distance)` for other tiles.

    Args:
      first: meets this PE's own tile.
      visit: meets the tile that started `distance` PEs back along the ring.
      carry: any pytree.
      keys: this PE's own tile.
      tiles: how many tiles a PE meets, its own included.
    """
    arriving = _shift(keys) if tiles > 1 else keys
    carry = first(carry, keys, 0)
    if tiles == 1:
        return carry

    def step(
        state: tuple[Carry, Keys], distance: Int[Array, ""]
    ) -> tuple[tuple[Carry, Keys], None]:
        carry, keys = state
        # Sent before the visit, so that the send runs beside it.
        arriving = _shift(keys)
        return (visit(carry, keys, distance), arriving), None

    # The last tile is met outside the loop: it need not travel on.
    (carry, keys), _ = lax.scan(step, (carry, arriving), jnp.arange(1, tiles - 1))
    return visit(carry, keys, tiles - 1)


def travel_with_gradients(
    first: Callable[[Gradients, Keys, Distance], Gradients],
    visit: Callable[[Gradients, Keys, Distance], Gradients],
    sums: Gradients,
    keys: Keys,
    tiles: int,
) -> Gradients:
    """`travel` for gradients: the gradient of a tile of keys travels with it, and ends at home."""

    def shift_and_visit(sums: Gradients, keys: Keys, distance: Distance) -> Gradients:
        return visit(sums._replace(dkv=fabric.shift(sums.dkv, ROWS)), keys, distance)

    sums = travel(first, shift_and_visit, sums, keys, tiles)
    if tiles == 1:
        return sums
    # After the last visit a tile's gradient is `tiles - 1` places from home: one shift, that far.
    return sums._replace(dkv=fabric.shift(sums.dkv, ROWS, 1 - tiles))


def _kind(rule: Rule) -> vendor.TileKind:
    return "any" if rule.masks_positions else "full"


def _shift(keys: Keys) -> Keys:
    kv, segments = fabric.shift((keys.kv, keys.segments), ROWS)
    return keys._replace(kv=kv, segments=segments)


def _set_start(keys: Keys, distance: Distance) -> Keys:
    """The keys with the positions of the tile that is `distance` PEs back."""
    place = (fabric.axis_index(ROWS) - distance) % fabric.axis_size(ROWS)
    return keys._replace(start=tile.block_starts(keys.kv, place))
