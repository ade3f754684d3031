"""Choose the kernel for a tile of attention: the vendor's, or our blocked one.

Public per-PE functions, without communication. A kernel for one backend, for example one in
Pallas, would join `absorb` here. It must return a tile's result and the log-sum-exp of each row's
scores.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern.kernels.attention import tile, tile_gradients
from wsekern.kernels.attention.mask import Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients

# "full": every query sees every key. "diagonal": as many keys as queries, query t sees keys 0 to t.
TileKind = Literal["full", "diagonal", "any"]


def absorb(
    running: tile.RunningSoftmax | None, rows: Rows, keys: Keys, rule: Rule, kind: TileKind
) -> tile.RunningSoftmax:
    """The softmax with one more tile of keys in it; None stands for one over no keys.

    The vendor's kernel is `jax.nn.dot_product_attention`'s, for tiles that are full or exactly
    causal. Its cuDNN side has not been run: there was no GPU to run it on.
    """
    if _vendor_serves(rows, rule, kind):
        return _merge(running, *_vendor_attention(rows, keys, rule, kind == "diagonal"))
    return tile.absorb(running, rows, keys, rule.without_positions() if kind == "full" else rule)


def gradients(rows: Rows, keys: Keys, rule: Rule, kind: TileKind) -> Gradients:
    """The gradients of a tile of queries and of the only tile of keys that they see, in float32."""
    if not _vendor_serves(rows, rule, kind):
        return tile_gradients.add(tile_gradients.zero_gradients(rows, keys), rows, keys, rule)
    assert rows.dout is not None
    causal, kv_heads = kind == "diagonal", rows.q.shape[2]
    q, dout = tile.unblock_queries(rows.q), tile.unblock_queries(rows.dout)
    operands = q, *tile.unblock_keys(keys.kv)
    # Its vjp computes the forward pass again, hence the log-sum-exp of this one tile: that is the
    # row's own only because the queries see no other tile.
    _, pullback = jax.vjp(lambda q, k, v: _kernel(q, k, v, rule, causal)[0], *operands)
    dq, dk, dv = (x.astype(jnp.float32) for x in pullback(dout.astype(q.dtype)))
    dq = tile.block_queries(dq, kv_heads, rows.q.shape[0]).transpose(0, 1, 2, 5, 3, 4)
    return Gradients(dq, tile.block_keys(dk, dv, keys.kv.shape[0]), None)


def can_merge(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the log-sum-exp that jax.nn's attention returns is exact enough to merge tiles by.

    jax 0.10 to 0.12 round it to the operands' dtype. In 16 bits, weights would be off by percents.
    """
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), dtype)
    attention = functools.partial(jax.nn.dot_product_attention, return_residual=True)
    return jax.eval_shape(attention, x, x, x)[1].dtype == jnp.float32


def _vendor_serves(rows: Rows, rule: Rule, kind: TileKind) -> bool:
    plain = rows.segments is None and rows.bias is None and rule.soft_cap is None
    return rule.vendor is not None and plain and kind != "any"


def _vendor_attention(
    rows: Rows, keys: Keys, rule: Rule, causal: bool
) -> tuple[Float[Array, "nq B K G c H"], Float[Array, "nq B K G c"]]:
    kv_heads, blocks = rows.q.shape[2], rows.q.shape[0]
    q = tile.unblock_queries(rows.q)
    out, lse = _kernel(q, *tile.unblock_keys(keys.kv), rule, causal)
    out, lse = (tile.block_queries(x, kv_heads, blocks) for x in (out, lse[..., None]))
    return out.astype(jnp.float32), lse[..., 0].astype(jnp.float32)


def _kernel(
    q: Float[Array, "B Tt Nt H"],
    k: Float[Array, "B St Kt H"],
    v: Float[Array, "B St Kt H"],
    rule: Rule,
    causal: bool,
) -> tuple[Float[Array, "B Tt Nt H"], Float[Array, "B Tt Nt"]]:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=rule.scale,
        is_causal=causal,
        implementation=rule.vendor,
        return_residual=True,
    )


def _merge(
    running: tile.RunningSoftmax | None,
    out: Float[Array, "nq B K G c H"],
    lse: Float[Array, "nq B K G c"],
) -> tile.RunningSoftmax:
    # `out` is normalized: as a running softmax its weights sum to one, at a peak of `lse`.
    if running is None:
        return tile.RunningSoftmax(out, jnp.ones_like(lse), lse)
    peak = jnp.maximum(running.peak, lse)
    fade, weight = jnp.exp(running.peak - peak), jnp.exp(lse - peak)
    return tile.RunningSoftmax(
        running.out * fade[..., None] + out * weight[..., None],
        running.total * fade + weight,
        peak,
    )
