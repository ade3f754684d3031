"""This file is where a tile of attention gets its kernel: the vendor's, or the blocked one.

Public per-PE functions, without communication. A kernel for one backend, such as one in Pallas,
joins `absorb` here; what it needs is a tile's result and the log-sum-exp of each row's scores.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from wsekern.kernels.attention import tile, tile_gradients
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients

# "full": each query sees each key. "diagonal": as many keys as queries, query t sees keys 0 to t.
Kind = Literal["full", "diagonal", "any"]


def absorb(
    running: tile.Running | None, rows: Rows, keys: Keys, rule: Rule, kind: Kind
) -> tile.Running:
    """The softmax with one more tile of keys in it; None is one over no keys.

    The vendor's kernel is `jax.nn.dot_product_attention`'s, for tiles that are full or exactly
    causal. Its cuDNN side has not been run: there was no GPU to do so.
    """
    if _serves(rows, rule, kind):
        return _merged(running, *_vendor(rows, keys, rule, kind == "diagonal"))
    whole = rule.everywhere() if kind == "full" else rule
    return tile.absorb(running, rows, keys, whole)


def gradients(rows: Rows, keys: Keys, rule: Rule, kind: Kind) -> Gradients:
    """The gradients of a tile of queries and the one tile of keys that they see, in float32."""
    if not _serves(rows, rule, kind):
        return tile_gradients.add(tile_gradients.nothing_yet(rows, keys), rows, keys, rule)
    assert rows.dout is not None
    causal, kv_heads = kind == "diagonal", rows.q.shape[2]
    q, dout = tile.unblocked_queries(rows.q), tile.unblocked_queries(rows.dout)
    operands = q, *tile.unblocked_keys(keys.kv)
    _, pull = jax.vjp(lambda q, k, v: _kernel(q, k, v, rule, causal)[0], *operands)
    dq, dk, dv = (x.astype(jnp.float32) for x in pull(dout.astype(q.dtype)))
    dq = tile.blocked_queries(dq, kv_heads, rows.q.shape[0]).transpose(0, 1, 2, 5, 3, 4)
    return Gradients(dq, tile.blocked_keys(dk, dv, keys.kv.shape[0]), None)


def merges(dtype: jnp.dtype) -> bool:
    """Whether tiles of `dtype` can be merged by the log-sum-exp that jax.nn's attention returns.

    jax 0.10 to 0.12 round it to the operands' dtype: of 16 bits, weights would be off by percents.
    """
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), dtype)
    attention = functools.partial(jax.nn.dot_product_attention, return_residual=True)
    return jax.eval_shape(attention, x, x, x)[1].dtype == jnp.float32


def _serves(rows: Rows, rule: Rule, kind: Kind) -> bool:
    plain = rows.segments is None and rows.bias is None and rule.soft_cap is None
    return rule.vendor is not None and plain and kind != "any"


def _vendor(rows: Rows, keys: Keys, rule: Rule, causal: bool) -> tuple[jax.Array, jax.Array]:
    kv_heads, blocks = rows.q.shape[2], rows.q.shape[0]
    q = tile.unblocked_queries(rows.q)
    out, lse = _kernel(q, *tile.unblocked_keys(keys.kv), rule, causal)
    out, lse = (tile.blocked_queries(x, kv_heads, blocks) for x in (out, lse[..., None]))
    return out.astype(jnp.float32), lse[..., 0].astype(jnp.float32)


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule, causal: bool):
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=rule.scale,
        is_causal=causal,
        implementation=rule.vendor,
        return_residual=True,
    )


def _merged(running: tile.Running | None, out: jax.Array, lse: jax.Array) -> tile.Running:
    if running is None:
        return tile.Running(out, jnp.ones_like(lse), lse)
    peak = jnp.maximum(running.peak, lse)
    fade, weight = jnp.exp(running.peak - peak), jnp.exp(lse - peak)
    return tile.Running(
        running.out * fade[..., None] + out * weight[..., None],
        running.total * fade + weight,
        peak,
    )
