"""This file is where a tile of attention gets its kernel: the vendor's, or the blocked one.

Public per-PE functions, without communication. A kernel for one backend, such as one in Pallas,
joins `absorb` here; what it needs is a tile's result and the log-sum-exp of each row's scores.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from wsekern.kernels import tile_attention as blocked
from wsekern.kernels.visibility import Keys, Rows, Rule

# "full": each query sees each key. "diagonal": as many keys as queries, query t sees keys 0 to t.
Kind = Literal["full", "diagonal", "any"]


def absorb(
    running: blocked.Running | None, rows: Rows, keys: Keys, rule: Rule, kind: Kind
) -> blocked.Running:
    """The softmax with one more tile of keys in it; None is one over no keys.

    The vendor's kernel is `jax.nn.dot_product_attention`'s, for tiles that are full or exactly
    causal. It returns a row's log-sum-exp in the dtype of the operands, so tiles are merged under
    weights no more exact than that. Its cuDNN side has not been run: there was no GPU to do so.
    """
    plain = rows.segments is None and rows.bias is None and rule.soft_cap is None
    if rule.vendor is not None and plain and kind != "any":
        return _merged(running, *_vendor(rows, keys, rule, kind == "diagonal"))
    whole = rule.everywhere() if kind == "full" else rule
    return blocked.absorb(running, rows, keys, whole)


def _vendor(rows: Rows, keys: Keys, rule: Rule, causal: bool) -> tuple[jax.Array, jax.Array]:
    kv_heads, blocks = rows.q.shape[2], rows.q.shape[0]
    k, v = blocked.unblocked_keys(keys.kv)
    out, lse = jax.nn.dot_product_attention(
        blocked.unblocked_queries(rows.q),
        k,
        v,
        scale=rule.scale,
        is_causal=causal,
        implementation=rule.vendor,
        return_residual=True,
    )
    out, lse = (blocked.blocked_queries(x, kv_heads, blocks) for x in (out, lse[..., None]))
    return out.astype(jnp.float32), lse[..., 0].astype(jnp.float32)


def _merged(running: blocked.Running | None, out: jax.Array, lse: jax.Array) -> blocked.Running:
    if running is None:
        return blocked.Running(out, jnp.ones_like(lse), lse)
    peak = jnp.maximum(running.peak, lse)
    fade, weight = jnp.exp(running.peak - peak), jnp.exp(lse - peak)
    return blocked.Running(
        running.out * fade[..., None] + out * weight[..., None],
        running.total * fade + weight,
        peak,
    )
