"""This file is attention inside one PE: a tile of queries meets a tile of keys and values.

Public per-PE functions, without communication. Tiles are held in blocks, so that no scores larger
than one block of queries times one block of keys exist:
T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
The running softmax is Milakov and Gimelshein's, "Online normalizer calculation for softmax", 2018.

Queries are `[nq, B, K, G, c, H]`: nq blocks of c rows; K key-value heads serve G query heads each.
Keys and values are one array, `[nk, 2, B, K, s, H]`: nk blocks of s rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.attention.heads import few_at_once
from wsekern.kernels.attention.mask import LOWEST, Keys, Rows, Rule, near, scored, where_seen


class Running(NamedTuple):
    """A softmax under way, in float32: values summed under weights exp(score - peak)."""

    out: Float[Array, "nq B K G c H"]
    total: Float[Array, "nq B K G c"]
    peak: Float[Array, "nq B K G c"]


def blocked_queries(x: Float[Array, "B Tt Nt H"], kv_heads: int, blocks: int) -> jax.Array:
    """A tile of queries, or of what belongs to them, as `[nq, B, K, G, c, H]`."""
    B, T, N, H = x.shape
    x = x.reshape(B, blocks, T // blocks, kv_heads, N // kv_heads, H)
    return x.transpose(1, 0, 3, 4, 2, 5)


def unblocked_queries(x: Float[Array, "nq B K G c H"]) -> Float[Array, "B Tt Nt H"]:
    """The inverse of `blocked_queries`."""
    n, B, K, G, c, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * c, K * G, H)


def blocked_keys(k: jax.Array, v: jax.Array, blocks: int) -> Float[Array, "nk 2 B K s H"]:
    """Tiles `[B, St, Kt, H]` of keys and values as one array, that moves as one."""
    B, S, K, H = k.shape
    both = jnp.stack([x.reshape(B, blocks, S // blocks, K, H) for x in (k, v)])
    return both.transpose(2, 0, 1, 4, 3, 5)


def unblocked_keys(kv: Float[Array, "nk 2 B K s H"]) -> tuple[jax.Array, jax.Array]:
    """The inverse of `blocked_keys`."""
    n, _, B, K, c, H = kv.shape
    k, v = kv.transpose(1, 2, 0, 4, 3, 5).reshape(2, B, n * c, K, H)
    return k, v


def joined(kv: Float[Array, "nk 2 B K s H"], blocks: int) -> Float[Array, "_ 2 B K _ H"]:
    """Keys and values in fewer, longer blocks."""
    n, _, B, K, c, H = kv.shape
    kv = kv.reshape(blocks, n // blocks, 2, B, K, c, H).transpose(0, 2, 3, 4, 1, 5, 6)
    return kv.reshape(blocks, 2, B, K, n // blocks * c, H)


def parted(kv: Float[Array, "_ 2 B K _ H"], blocks: int) -> Float[Array, "nk 2 B K s H"]:
    """The inverse of `joined`."""
    n, _, B, K, c, H = kv.shape
    kv = kv.reshape(n, 2, B, K, blocks // n, n * c // blocks, H).transpose(0, 4, 1, 2, 3, 5, 6)
    return kv.reshape(blocks, 2, B, K, n * c // blocks, H)


def starts(x: Float[Array, "n ..."], place: jax.Array | int) -> jax.Array:
    """The position at which each of the blocks `x` begins, in tile `place` of a sequence."""
    n, c = x.shape[0], x.shape[-2]
    return (place * n + jnp.arange(n)) * c


def nothing_yet(q: Float[Array, "nq B K G c H"]) -> Running:
    """A softmax over no keys."""
    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    return fabric.varying(Running(jnp.zeros(q.shape, jnp.float32), rows, rows + LOWEST))


def absorb(running: Running | None, rows: Rows, keys: Keys, rule: Rule) -> Running:
    """The softmax with one more tile of keys in it; None is one over no keys.

    A block of keys that no query of a block of `rows` sees is not computed.
    """
    if running is None and rule.band is None and len(rows.q) == len(keys.kv) == 1:
        row, key = jax.tree.map(lambda x: x[0], (rows, keys))
        alone = _absorb_block(None, row, key, rule, rule.bounded)
        return jax.tree.map(lambda x: x[None], alone)
    running = nothing_yet(rows.q) if running is None else running
    return few_at_once(functools.partial(_absorb_heads, rule=rule), running, rows, keys, rule)


def _absorb_heads(running: Running, rows: Rows, keys: Keys, rule: Rule) -> Running:
    def one_query_block(_, block):
        running, rows = block

        def one_key_block(running, keys):
            if rule.band is not None:
                keys, _ = near(rows, keys, rule)

            def step(running, masked):
                return _absorb_block(running, rows, keys, rule, masked)

            return where_seen(step, running, rows, keys, rule), None

        return None, scan(one_key_block, running, keys)[0]

    return scan(one_query_block, None, (running, rows))[1]


def finish(
    running: Running, sinks: Float[Array, "K G"] | None, dtype: Any
) -> tuple[Float[Array, "nq B K G c H"], Float[Array, "nq B K G c"]]:
    """Attention's result in `dtype`, and each row's log-sum-exp of scores.

    Args:
      running: the softmax over all keys.
      sinks: a score for each head that counts as one more key, without a value.
      dtype: of the result; a row that sees no key is zeros.
    """
    out, total, peak = running
    if sinks is not None:
        extra = jnp.broadcast_to(sinks[None, None, :, :, None], peak.shape)
        raised = jnp.maximum(peak, extra)
        fade = jnp.exp(peak - raised)
        out, total = out * fade[..., None], total * fade + jnp.exp(extra - raised)
        peak = raised
    total = jnp.where(total > 0, total, 1)
    return (out / total[..., None]).astype(dtype), peak + jnp.log(total)


def scan(body, carry, xs):
    """`lax.scan`, without a loop where there is one block only."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)


def dot(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product summed in float32."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _absorb_block(running, rows, keys, rule, masked):
    k, v = keys.kv
    scores, _ = scored(dot("bkgth,bksh->bkgts", rows.q, k), rows, keys, rule, masked)
    peak = jnp.maximum(LOWEST if running is None else running.peak, scores.max(-1))
    weights = jnp.exp(scores - peak[..., None])
    new = dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    if running is None:
        return Running(new, weights.sum(-1), peak)
    fade = jnp.exp(running.peak - peak)
    return Running(
        running.out * fade[..., None] + new, running.total * fade + weights.sum(-1), peak
    )
