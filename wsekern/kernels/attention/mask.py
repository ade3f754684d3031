"""Which keys a query may see, and how products of queries and keys become scores.

Public per-PE functions, without communication. A block of scores has the axes `[B, K, G, c, s]`:
K key-value heads, the G query heads that each of them serves, c queries and s keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Carry = TypeVar("Carry")

# Below this, a score counts as -inf. It is finite, so that subtracting two of them gives no NaN.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How queries and keys are scored, and which keys a query may see."""

    scale: float  # multiplies the products of queries and keys
    causal: bool = False  # a query sees only keys at its own position or before it
    window: int | None = None  # and of these only the last `window`
    # With a narrow window, a block of queries meets one band of so many keys, cut out of a tile
    # that is one block; None: it meets the blocks of the tile in turn.
    band: int | None = None
    keys: int | None = None  # keys from this position on are padding; None: none need masking
    soft_cap: float | None = None  # a score becomes soft_cap * tanh(score / soft_cap)
    # Leave out blocks of keys that no query sees. Off for virtual PEs: under vmap a branch on a
    # traced value runs both sides, so it would only cost.
    skips_blocks: bool = True
    # Where the stretches of a PE's rows may begin, counted from its first key: a tuple for each PE
    # and step. A kernel states the work of the one with the most. None: anywhere.
    row_starts: tuple[tuple[int, ...], ...] | None = None
    rows_see_keys: bool = False  # every row sees a key of the tile, whatever the numbers are
    scores_at_once: int | None = None  # size of a block of scores that fits the cache; None: any
    precision: lax.PrecisionLike = None  # of every product
    implementation: Literal["xla", "splash", "cudnn", "pallas"] = "xla"  # what takes a tile
    platform: str | None = None  # that the program is compiled for; None: an abstract wafer

    @property
    def masks_positions(self) -> bool:
        """Whether a key's position can hide it from a query."""
        return self.causal or self.keys is not None

    def without_positions(self) -> Rule:
        """The rule for a tile in which every query may see every key."""
        return dataclasses.replace(self, causal=False, window=None, keys=None)

    def on_the_diagonal(self) -> Rule:
        """The rule for a tile whose rows and keys have the same positions."""
        return dataclasses.replace(self, row_starts=((0,),))


class Rows(NamedTuple):
    """Queries in nq blocks, and the arrays that have a number for each of their rows.

    A loop over blocks takes off the first axis.
    """

    q: Float[Array, "nq B K G c H"]
    # Position of each block's first row. For splash attention, the one block may consist of
    # stretches of equally many rows, and each of them has its start.
    start: Int[Array, " nq"]
    segments: Int[Array, "nq B c"] | None = None
    bias: Float[Array, "nq _ _ _ _ _"] | None = None  # for all keys; axes of size 1 broadcast
    dout: Float[Array, "nq B K G c H"] | None = None  # gradient of the result
    lse: Float[Array, "nq B K G c"] | None = None  # log-sum-exp of the row's scores
    delta: Float[Array, "nq B K G c"] | None = None  # dot product of the result and `dout`


KeysAndValues = tuple[Float[Array, "B K s H"], Float[Array, "B K s H"]]


class Keys(NamedTuple):
    """Keys and values in nk blocks, `[nk, 2, B, K, s, H]`.

    They are one array, so that one send moves both. A Pallas kernel takes each alone: of a tile
    that does not travel, `kv` is `((keys, values),)`, which spares the copies.
    """

    kv: Any
    start: Int[Array, " nk"]  # position of each block's first key
    segments: Int[Array, "nk B s"] | None = None


def keys_in_band(rows: Rows, keys: Keys, rule: Rule) -> tuple[Keys, Int[Array, ""]]:
    """The band of a tile's keys that one block of queries meets, and where in the tile it begins.

    Every block's band has the same length, so one that meets an end of the tile is moved inward
    and has keys outside the window; the mask hides them.
    """
    tile = keys.kv.shape[-2]
    assert rule.band is not None and rule.window is not None
    length = min(rule.band, tile)
    begin = jnp.clip(rows.start - rule.window + 1 - keys.start, 0, tile - length)
    kv = lax.dynamic_slice_in_dim(keys.kv, begin, length, -2)
    segments = keys.segments
    if segments is not None:
        segments = lax.dynamic_slice_in_dim(segments, begin, length, -1)
    return Keys(kv, keys.start + begin, segments), begin


def run_where_seen(
    step: Callable[[Carry, bool], Carry], carry: Carry, rows: Rows, keys: Keys, rule: Rule
) -> Carry:
    """`step(carry, masked)`, or `carry` unchanged where no query of the block sees any of the keys.

    Args:
      step: gets `masked`, False where every query sees every key, so that no mask is needed.
      carry: any pytree.
      rows: one block of queries.
      keys: one block of keys.
      rule: which positions are seen; segments are not looked at.
    """
    if not rule.masks_positions:
        return step(carry, False)
    if not rule.skips_blocks:
        return step(carry, True)
    last_row = rows.start + rows.q.shape[-2] - 1
    last_key = keys.start + keys.kv.shape[-2] - 1
    none_seen, all_seen = jnp.bool_(False), jnp.bool_(True)
    if rule.causal:
        none_seen |= keys.start > last_row
        all_seen &= last_key <= rows.start
    if rule.window is not None:
        none_seen |= last_key <= rows.start - rule.window
        all_seen &= keys.start > last_row - rule.window
    if rule.keys is not None:
        none_seen |= keys.start >= rule.keys
        all_seen &= last_key < rule.keys
    branches = [lambda c: c, lambda c: step(c, False), lambda c: step(c, True)]
    return lax.switch(jnp.where(none_seen, 0, jnp.where(all_seen, 1, 2)), branches, carry)


def to_scores(
    products: Float[Array, "B K G c s"], rows: Rows, keys: Keys, rule: Rule, masked: bool
) -> tuple[Float[Array, "B K G c s"], Float[Array, "B K G c s"] | None]:
    """Scores, -inf where the query may not see the key, and the slope of the soft cap or None.

    Args:
      products: of one block of queries and one of keys.
      rows: the queries.
      keys: the keys.
      rule: scale, soft cap and mask, applied in this order, the bias before the mask.
      masked: whether positions can hide a key in this block.
    """
    scores, slope = products, None
    if rule.scale != 1:
        scores = scores * rule.scale
    if rule.soft_cap is not None:
        capped = jnp.tanh(scores / rule.soft_cap)
        scores, slope = capped * rule.soft_cap, 1 - capped * capped
    if rows.bias is not None:
        scores = scores + _bias_of_keys(rows.bias, keys).astype(jnp.float32)
    visible = _visible(rows, keys, rule, masked)
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf), slope


def _bias_of_keys(bias: Float[Array, "_ _ _ _ _"], keys: Keys) -> Float[Array, "_ _ _ _ _"]:
    if bias.shape[-1] == 1:
        return bias
    return lax.dynamic_slice_in_dim(bias, keys.start, keys.kv.shape[-2], axis=-1)


def _visible(rows: Rows, keys: Keys, rule: Rule, masked: bool) -> Bool[Array, "_ _ _ _ _"] | None:
    """Which keys each query may see, broadcastable to the scores; None where it may see all."""
    conditions: list[jax.Array] = []
    if masked:
        key = keys.start + jnp.arange(keys.kv.shape[-2]).reshape(1, 1, 1, 1, -1)
        row = rows.start + jnp.arange(rows.q.shape[-2]).reshape(1, 1, 1, -1, 1)
        if rule.causal:
            conditions.append(key <= row)
        if rule.window is not None:
            conditions.append(key > row - rule.window)
        if rule.keys is not None:
            conditions.append(key < rule.keys)
    if rows.segments is not None:
        assert keys.segments is not None
        B = rows.segments.shape[0]
        of_rows = rows.segments.reshape(B, 1, 1, -1, 1)
        of_keys = keys.segments.reshape(B, 1, 1, 1, -1)
        conditions.append(of_rows == of_keys)
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible
