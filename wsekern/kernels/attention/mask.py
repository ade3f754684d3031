"""This file is which key a query may see, and how a score comes of their product.

Public per-PE functions, without communication. A block of scores has the axes `[B, K, G, c, s]`:
K key-value heads serve G query heads each, c rows are queries, s columns are keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# What is no more than this is no score at all. Finite, so that the difference of two is a number.
LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores come from queries and keys, and which key a query may see."""

    scale: float  # of products of queries and keys
    causal: bool = False  # only keys at the query's own position or before
    window: int | None = None  # only the last so many of these
    # Keys that a block of queries meets at once, one block of which is then the whole tile; None
    # where it meets blocks of them in turn.
    band: int | None = None
    keys: int | None = None  # positions from here on are padding; None where none need be masked
    soft_cap: float | None = None  # scores are soft_cap * tanh(score / soft_cap)
    # Whether a branch leaves out a block that no query sees. Virtual PEs would run all branches.
    skips: bool = True
    at_once: int | None = None  # scores of one block that a PE had better hold; None for any number
    # The `implementation` of jax.nn's attention that takes whole tiles, if one is to.
    vendor: Literal["xla", "cudnn"] | None = None

    @property
    def bounded(self) -> bool:
        """Whether positions decide at all which keys are seen."""
        return self.causal or self.keys is not None

    def everywhere(self) -> Rule:
        """The rule in a tile of which every query may see every key."""
        return dataclasses.replace(self, causal=False, window=None, keys=None)


class Rows(NamedTuple):
    """Queries in nq blocks, and what belongs to each row of them."""

    q: Float[Array, "nq B K G c H"]
    start: Int[Array, " nq"]  # the position of each block's first row
    segments: Int[Array, "nq B c"] | None = None
    bias: Float[Array, "nq _ _ _ _ _"] | None = None  # against all keys; sizes of 1 are for all
    dout: Float[Array, "nq B K G c H"] | None = None  # the gradient of the result
    lse: Float[Array, "nq B K G c"] | None = None  # the log of the summed exponentials
    dot: Float[Array, "nq B K G c"] | None = None  # of the result and its gradient


class Keys(NamedTuple):
    """Keys and values as one array, in nk blocks."""

    kv: Float[Array, "nk 2 B K s H"]
    start: Int[Array, " nk"]
    segments: Int[Array, "nk B s"] | None = None


def near(rows: Rows, keys: Keys, rule: Rule) -> tuple[Keys, jax.Array]:
    """The keys of a whole tile that a block `rows` meets at once, and the place of the first.

    There are as many of them everywhere: at an end of the tile some lie outside of the window.
    """
    whole = keys.kv.shape[-2]
    assert rule.band is not None and rule.window is not None
    length = min(rule.band, whole)
    at = jnp.clip(rows.start - rule.window + 1 - keys.start, 0, whole - length)
    kv = lax.dynamic_slice_in_dim(keys.kv, at, length, -2)
    segments = keys.segments
    if segments is not None:
        segments = lax.dynamic_slice_in_dim(segments, at, length, -1)
    return Keys(kv, keys.start + at, segments), at


def where_seen(step: Callable, carry: Any, rows: Rows, keys: Keys, rule: Rule) -> Any:
    """`step(carry, masked)` where a query of a block `rows` may see a key of `keys`, else `carry`.

    `masked` says whether some query may not see some key.
    """
    if not rule.bounded:
        return step(carry, False)
    if not rule.skips:
        return step(carry, True)
    last_row = rows.start + rows.q.shape[-2] - 1
    last_key = keys.start + keys.kv.shape[-2] - 1
    unseen, whole = jnp.bool_(False), jnp.bool_(True)
    if rule.causal:
        unseen, whole = unseen | (keys.start > last_row), whole & (last_key <= rows.start)
    if rule.window is not None:
        unseen |= last_key <= rows.start - rule.window
        whole &= keys.start > last_row - rule.window
    if rule.keys is not None:
        unseen, whole = unseen | (keys.start >= rule.keys), whole & (last_key < rule.keys)
    branches = [lambda c: c, lambda c: step(c, False), lambda c: step(c, True)]
    return lax.switch(jnp.where(unseen, 0, jnp.where(whole, 1, 2)), branches, carry)


def scored(
    products: Float[Array, "B K G c s"], rows: Rows, keys: Keys, rule: Rule, masked: bool
) -> tuple[Float[Array, "B K G c s"], jax.Array | None]:
    """Scores, -inf where the query may not see the key, and the slope of the soft cap."""
    scores, slope = products, None
    if rule.scale != 1:
        scores = scores * rule.scale
    if rule.soft_cap is not None:
        bent = jnp.tanh(scores / rule.soft_cap)
        scores, slope = bent * rule.soft_cap, 1 - bent * bent
    if rows.bias is not None:
        scores = scores + _columns(rows.bias, keys).astype(jnp.float32)
    seen = _seen(rows, keys, rule, masked)
    return scores if seen is None else jnp.where(seen, scores, -jnp.inf), slope


def _columns(bias: Float[Array, "_ _ _ _ _"], keys: Keys) -> jax.Array:
    if bias.shape[-1] == 1:
        return bias
    return lax.dynamic_slice_in_dim(bias, keys.start, keys.kv.shape[-2], axis=-1)


def _seen(rows: Rows, keys: Keys, rule: Rule, masked: bool) -> jax.Array | None:
    """What may be seen, of a shape that broadcasts to the scores'; None where all may."""
    parts = []
    if masked:
        key = keys.start + jnp.arange(keys.kv.shape[-2]).reshape(1, 1, 1, 1, -1)
        row = rows.start + jnp.arange(rows.q.shape[-2]).reshape(1, 1, 1, -1, 1)
        if rule.causal:
            parts.append(key <= row)
        if rule.window is not None:
            parts.append(key > row - rule.window)
        if rule.keys is not None:
            parts.append(key < rule.keys)
    if rows.segments is not None:
        assert keys.segments is not None
        B = rows.segments.shape[0]
        parts.append(rows.segments.reshape(B, 1, 1, -1, 1) == keys.segments.reshape(B, 1, 1, 1, -1))
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen
