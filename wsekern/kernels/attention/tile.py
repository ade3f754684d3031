"""Attention inside one PE: a tile of queries meets a tile of keys and values, block by block.

Public per-PE functions, without communication. No array of scores is larger than one block of
queries times one block of keys:
T. Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
The running softmax is Milakov and Gimelshein's, "Online normalizer calculation for softmax", 2018.

Queries are `[nq, B, K, G, c, H]`: nq blocks of c rows; each of K key-value heads serves G query
heads. Keys and values are one array, `[nk, 2, B, K, s, H]`: nk blocks of s rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree, Shaped

from wsekern import fabric
from wsekern.kernels.attention.heads import few_heads_at_once
from wsekern.kernels.attention.mask import (
    LOWEST,
    Keys,
    Rows,
    Rule,
    keys_in_band,
    run_where_seen,
    to_scores,
)

Carry = TypeVar("Carry")


class RunningSoftmax(NamedTuple):
    """A softmax over the keys met so far, in float32.

    With weights exp(score - peak): the weighted sum of values, the sum of weights, and the largest
    score. Attention is `out / total`.
    """

    out: Float[Array, "nq B K G c H"]
    total: Float[Array, "nq B K G c"]
    peak: Float[Array, "nq B K G c"]


def block_queries(
    x: Float[Array, "B Tt Nt H"], kv_heads: int, blocks: int
) -> Float[Array, "nq B K G c H"]:
    """A tile of queries, or of anything with a number for each of their rows, in blocks."""
    B, T, N, H = x.shape
    # Rows next to features: the products are then batches of [c, H] matrices, without a transpose.
    x = x.reshape(B, blocks, T // blocks, kv_heads, N // kv_heads, H)
    return x.transpose(1, 0, 3, 4, 2, 5)


def unblock_queries(x: Float[Array, "nq B K G c H"]) -> Float[Array, "B Tt Nt H"]:
    """The inverse of `block_queries`."""
    n, B, K, G, c, H = x.shape
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(B, n * c, K * G, H)


def block_keys(
    k: Float[Array, "B St Kt H"], v: Float[Array, "B St Kt H"], blocks: int
) -> Float[Array, "nk 2 B K s H"]:
    """Tiles of keys and of values as one array, so that one send moves both."""
    B, S, K, H = k.shape
    both = jnp.stack([x.reshape(B, blocks, S // blocks, K, H) for x in (k, v)])
    return both.transpose(2, 0, 1, 4, 3, 5)


def unblock_keys(
    kv: Float[Array, "nk 2 B K s H"],
) -> tuple[Float[Array, "B St Kt H"], Float[Array, "B St Kt H"]]:
    """The inverse of `block_keys`."""
    n, _, B, K, c, H = kv.shape
    k, v = kv.transpose(1, 2, 0, 4, 3, 5).reshape(2, B, n * c, K, H)
    return k, v


def merge_blocks(kv: Float[Array, "nk 2 B K s H"], blocks: int) -> Float[Array, "_ 2 B K _ H"]:
    """Keys and values in `blocks` longer blocks, each made of neighboring ones."""
    n, _, B, K, c, H = kv.shape
    kv = kv.reshape(blocks, n // blocks, 2, B, K, c, H).transpose(0, 2, 3, 4, 1, 5, 6)
    return kv.reshape(blocks, 2, B, K, n // blocks * c, H)


def split_blocks(kv: Float[Array, "_ 2 B K _ H"], blocks: int) -> Float[Array, "nk 2 B K s H"]:
    """The inverse of `merge_blocks`."""
    n, _, B, K, c, H = kv.shape
    kv = kv.reshape(n, 2, B, K, blocks // n, n * c // blocks, H).transpose(0, 4, 1, 2, 3, 5, 6)
    return kv.reshape(blocks, 2, B, K, n * c // blocks, H)


def block_starts(x: Float[Array, "n ..."], place: Int[Array, ""] | int) -> Int[Array, " n"]:
    """The position at which each block of `x` begins, where `x` is tile `place` of a sequence."""
    n, c = x.shape[0], x.shape[-2]
    return (place * n + jnp.arange(n)) * c


def empty_softmax(q: Float[Array, "nq B K G c H"]) -> RunningSoftmax:
    """A softmax over no keys."""
    rows = jnp.zeros(q.shape[:-1], jnp.float32)
    # JAX wants a loop's carry marked as varying over PEs from the start, as it is in the end.
    return fabric.varying(RunningSoftmax(jnp.zeros(q.shape, jnp.float32), rows, rows + LOWEST))


def absorb(running: RunningSoftmax | None, rows: Rows, keys: Keys, rule: Rule) -> RunningSoftmax:
    """The softmax with one more tile of keys in it; None stands for one over no keys.

    A block of keys is skipped where no query of a block of `rows` sees any of them.
    """
    # One block each: a plain softmax, without loops and without older sums to rescale.
    if running is None and rule.band is None and len(rows.q) == len(keys.kv) == 1:
        row, key = jax.tree.map(lambda x: x[0], (rows, keys))
        softmax = _absorb_block(None, row, key, rule, rule.masks_positions)
        return jax.tree.map(lambda x: x[None], softmax)
    running = empty_softmax(rows.q) if running is None else running
    return few_heads_at_once(functools.partial(_absorb_heads, rule=rule), running, rows, keys, rule)


def _absorb_heads(running: RunningSoftmax, rows: Rows, keys: Keys, rule: Rule) -> RunningSoftmax:
    def one_query_block(_: None, block: tuple[RunningSoftmax, Rows]) -> tuple[None, RunningSoftmax]:
        running, rows = block

        def one_key_block(running: RunningSoftmax, keys: Keys) -> tuple[RunningSoftmax, None]:
            if rule.band is not None:
                keys, _ = keys_in_band(rows, keys, rule)

            def step(running: RunningSoftmax, masked: bool) -> RunningSoftmax:
                return _absorb_block(running, rows, keys, rule, masked)

            return run_where_seen(step, running, rows, keys, rule), None

        return None, scan_blocks(one_key_block, running, keys)[0]

    return scan_blocks(one_query_block, None, (running, rows))[1]


def finish(
    running: RunningSoftmax, sinks: Float[Array, "K G"] | None, dtype: jax.typing.DTypeLike
) -> tuple[Float[Array, "nq B K G c H"], Float[Array, "nq B K G c"]]:
    """Attention's result in `dtype`, and the log-sum-exp of each row's scores.

    Args:
      running: the softmax over all keys.
      sinks: a score for each head that counts as one more key, without a value.
      dtype: of the result. A row that sees no key is zeros, and its log-sum-exp is -inf.
    """
    out, total, peak = running
    # A sink may be higher than every score: rescale to the new peak, as for any other key.
    if sinks is not None:
        sink = jnp.broadcast_to(sinks[None, None, :, :, None], peak.shape)
        new_peak = jnp.maximum(peak, sink)
        fade = jnp.exp(peak - new_peak)
        out, total = out * fade[..., None], total * fade + jnp.exp(sink - new_peak)
        peak = new_peak
    # Where no key was seen, `out` is 0 and stays 0.
    nonzero = jnp.where(total == 0, 1, total)
    lse = jnp.where(total == 0, -jnp.inf, peak + jnp.log(nonzero))
    return (out / nonzero[..., None]).astype(dtype), lse


def softmax_weights(scores: Float[Array, "..."], lse: Float[Array, "..."]) -> Float[Array, "..."]:
    """`exp(scores - lse)`, the weights of a finished softmax; 0 in a row that saw no key."""
    # There `lse` is -inf, and so are the scores: their difference would be NaN.
    return jnp.exp(scores - jnp.where(lse == -jnp.inf, jnp.inf, lse))


def scan_blocks(
    body: Callable[[Carry, Any], tuple[Carry, Any]],
    carry: Carry,
    blocks: PyTree[Shaped[Array, "blocks ..."]],
) -> tuple[Carry, Any]:
    """`lax.scan`, but a single block is run without a loop."""
    if jax.tree.leaves(blocks)[0].shape[0] > 1:
        return lax.scan(body, carry, blocks)
    carry, y = body(carry, jax.tree.map(lambda x: x[0], blocks))
    return carry, jax.tree.map(lambda x: x[None], y)


def dot(
    subscripts: str,
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    precision: lax.PrecisionLike,
) -> Float[Array, "..."]:
    """A product summed in float32."""
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def _absorb_block(
    running: RunningSoftmax | None, rows: Rows, keys: Keys, rule: Rule, masked: bool
) -> RunningSoftmax:
    k, v = keys.kv
    products = dot("bkgth,bksh->bkgts", rows.q, k, rule.precision)
    scores, _ = to_scores(products, rows, keys, rule, masked)
    peak = jnp.maximum(LOWEST if running is None else running.peak, scores.max(-1))
    # The peak is at least LOWEST, so a row of -inf gives weights of 0 and not NaN. The weights take
    # the operands' dtype: 16-bit operands are multiplied in 16 bits, and summed in float32.
    weights = jnp.exp(scores - peak[..., None])
    new = dot("bkgts,bksh->bkgth", weights.astype(v.dtype), v, rule.precision)
    if running is None:
        return RunningSoftmax(new, weights.sum(-1), peak)
    # Weights so far were taken against a lower peak: bring both sums to the new one.
    fade = jnp.exp(running.peak - peak)
    return RunningSoftmax(
        running.out * fade[..., None] + new, running.total * fade + weights.sum(-1), peak
    )
