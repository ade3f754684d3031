"""This file is attention inside one PE: a tile of queries meets a tile of keys and values.

Public per-PE functions, without communication. Tiles are held in blocks, so that no scores larger
than one block of queries times one block of keys exist, and scores are recomputed for the gradient:
T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
The running softmax is Milakov and Gimelshein's, "Online normalizer calculation for softmax", 2018.

Queries are `[nq, B, K, G, c, H]`: nq blocks of c rows; K key-value heads serve G query heads each.
Keys and values are one array, `[nk, 2, B, K, s, H]`: nk blocks of s rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.tile_product import runnable

# No scores at all yet. Finite, so that a difference of two such maxima is a number.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How scores come from queries and keys: their scale, and which key a query may see."""

    scale: float
    causal: bool  # only keys at the query's own position or before
    keys: int | None  # positions from here on are padding; None where none need be masked


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


def whole(
    q: Float[Array, "B K G c H"],
    kv: Float[Array, "2 B K s H"],
    q_start: jax.Array | int,
    k_start: jax.Array | int,
    rule: Rule,
) -> tuple[Float[Array, "B K G c H"], Float[Array, "B K G c"]]:
    """Attention of one block of queries to one block that holds all keys, and the log-sum-exp.

    Args:
      q: queries.
      kv: keys and values.
      q_start: the position of the first query.
      k_start: the position of the first key.
      rule: which key a query may see; every query sees one.
    """
    k, v = kv
    scores = _masked(_dot("bkgth,bksh->bkgts", q, k), q_start, k_start, rule)
    peak = scores.max(-1)
    weights = jnp.exp(scores - peak[..., None])
    total = weights.sum(-1)
    out = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v) / total[..., None]
    return out.astype(q.dtype), peak + jnp.log(total)


def nothing_yet(q: Float[Array, "nq B K G c H"]) -> Running:
    """A softmax over no keys."""
    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    return fabric.varying(Running(jnp.zeros(q.shape, jnp.float32), rows, rows + _LOWEST))


def absorb(
    running: Running,
    q: Float[Array, "nq B K G c H"],
    kv: Float[Array, "nk 2 B K s H"],
    q_starts: Int[Array, " nq"],
    k_starts: Int[Array, " nk"],
    rule: Rule,
) -> Running:
    """The softmax with one more tile of keys in it.

    Args:
      running: the softmax so far.
      q: queries.
      kv: keys and values.
      q_starts: the position of the first row of each block of queries.
      k_starts: likewise of keys.
      rule: which key a query may see; a block that none of its queries sees is not computed.
    """

    def one_query_block(_, block):
        running, q, q_start = block

        def one_key_block(running, block):
            kv, k_start = block

            def step(running):
                return _absorb_block(running, q, kv, q_start, k_start, rule)

            return _where_seen(step, running, q, q_start, k_start, rule), None

        return None, _scan(one_key_block, running, (kv, k_starts))[0]

    return _scan(one_query_block, None, (running, q, q_starts))[1]


def finish(running: Running, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Attention's result in `dtype`, and each row's log-sum-exp of scores, `[nq, B, K, G, c]`."""
    out = (running.out / running.total[..., None]).astype(dtype)
    return out, running.peak + jnp.log(running.total)


def gradients(
    dq: Float[Array, "nq B K H G c"],
    dkv: Float[Array, "nk 2 B K s H"],
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    kv: Float[Array, "nk 2 B K s H"],
    q_starts: Int[Array, " nq"],
    k_starts: Int[Array, " nk"],
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """`dq` and `dkv` with what one tile of keys and values adds to them, in float32.

    Args:
      dq: the gradient of the queries so far, float32.
      dkv: that of this tile of keys and values, float32.
      rows: what is known of the queries: they, the gradient of their result (both
        `[nq, B, K, G, c, H]`), their log-sum-exp, and the dot product of result and gradient (both
        `[nq, B, K, G, c]`).
      kv: keys and values.
      q_starts: the position of the first row of each block of queries.
      k_starts: likewise of keys.
      rule: which key a query may see.
    """

    def one_key_block(dq, block):
        dkv, kv, k_start = block

        def one_query_block(dkv, block):
            dq, rows, q_start = block

            def step(grads):
                new = gradients_of_block(rows, kv, q_start, k_start, rule)
                return jax.tree.map(jnp.add, grads, new)

            dq, dkv = _where_seen(step, (dq, dkv), rows[0], q_start, k_start, rule)
            return dkv, dq

        dkv, dq = _scan(one_query_block, dkv, (dq, rows, q_starts))
        return dq, dkv

    return _scan(one_key_block, dq, (dkv, kv, k_starts))


def _absorb_block(running, q, kv, q_start, k_start, rule):
    k, v = kv
    scores = _masked(_dot("bkgth,bksh->bkgts", q, k), q_start, k_start, rule)
    peak = jnp.maximum(running.peak, scores.max(-1))
    weights = jnp.exp(scores - peak[..., None])
    fade = jnp.exp(running.peak - peak)
    new = _dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v)
    return Running(
        running.out * fade[..., None] + new, running.total * fade + weights.sum(-1), peak
    )


def gradients_of_block(
    rows: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    kv: Float[Array, "2 B K s H"],
    q_start: jax.Array | int,
    k_start: jax.Array | int,
    rule: Rule,
) -> tuple[Float[Array, "B K H G c"], Float[Array, "2 B K s H"]]:
    """What one block of queries and one of keys add to the gradients, in float32.

    Scores stand with keys as rows, and the gradient of queries comes transposed: so three of the
    five products need no transpose of a block of scores, and the others none at all.
    """
    q, dout, lse, dot = rows
    k, v = kv
    scores = _masked(_dot("bksh,bkgth->bksgt", k, q), q_start, k_start, rule, queries=4, keys=2)
    weights = jnp.exp(scores - lse[:, :, None])
    dv = _dot("bksgt,bkgth->bksh", weights.astype(dout.dtype), dout)
    dweights = _dot("bksh,bkgth->bksgt", v, dout)
    dscores = (weights * (dweights - dot[:, :, None]) * rule.scale).astype(q.dtype)
    dk = _dot("bksgt,bkgth->bksh", dscores, q)
    dq = _dot("bksh,bksgt->bkhgt", *runnable(k, dscores))
    return dq, jnp.stack([dk, dv])


def _masked(scores, q_start, k_start, rule, queries=3, keys=4):
    """Scores, scaled, where the query sees the key, else -inf; `queries`, `keys`: their axes."""
    scores = scores * rule.scale
    if not rule.causal and rule.keys is None:
        return scores
    shape = [n if axis in (queries, keys) else 1 for axis, n in enumerate(scores.shape)]
    key = k_start + lax.broadcasted_iota(jnp.int32, shape, keys)
    last = q_start + lax.broadcasted_iota(jnp.int32, shape, queries)
    if rule.keys is not None:
        last = jnp.minimum(last, rule.keys - 1) if rule.causal else rule.keys - 1
    return jnp.where(key <= last, scores, -jnp.inf)


def _where_seen(step, carry, q, q_start, k_start, rule):
    if not rule.causal:
        return step(carry)
    last = q_start + q.shape[-2] - 1
    return lax.cond(k_start <= last, step, lambda carry: carry, carry)


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _scan(body, carry, xs):
    """`lax.scan`, without a loop where there is one block only."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(body, carry, xs)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], xs))
    return carry, jax.tree.map(lambda x: x[None], y)
