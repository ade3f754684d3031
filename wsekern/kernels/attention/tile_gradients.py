"""The gradient of attention inside one PE, which computes the scores again block by block.

Public per-PE functions, without communication; blocks as in `tile`. T. Dao, "FlashAttention-2:
Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.attention.heads import few_heads_at_once
from wsekern.kernels.attention.mask import (
    Keys,
    Rows,
    Rule,
    keys_in_band,
    run_where_seen,
    to_scores,
)
from wsekern.kernels.attention.tile import dot, scan_blocks, softmax_weights
from wsekern.wafer.limits import widen_for_backend


class Gradients(NamedTuple):
    """Sums of gradients so far, in float32."""

    dq: Float[Array, "nq B K H G c"]  # transposed, as the product that makes it leaves it
    dkv: Any  # as `Keys.kv`
    dbias: Float[Array, "nq _ _ _ _ _"] | None


def zero_gradients(rows: Rows, keys: Keys) -> Gradients:
    """Gradients of zero, in the shapes of the operands."""
    dq = jnp.zeros(rows.q.swapaxes(-3, -1).swapaxes(-2, -1).shape, jnp.float32)
    dbias = None if rows.bias is None else jnp.zeros(rows.bias.shape, jnp.float32)
    return fabric.varying(Gradients(dq, jnp.zeros(keys.kv.shape, jnp.float32), dbias))


def add(sums: Gradients, rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """The gradients with the contribution of one tile of queries and one of keys added."""
    return few_heads_at_once(functools.partial(_add_heads, rule=rule), sums, rows, keys, rule)


def _add_heads(sums: Gradients, rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """Two loops: over blocks of keys, and for each of them over the blocks of queries.

    dkv belongs to a block of keys and is carried by the inner loop; dq belongs to a block of
    queries and passes through both; dbias belongs to both, so both loops carry all of it.
    """
    indices = jnp.arange(rows.q.shape[0])

    def one_key_block(
        carry: tuple[Float[Array, "..."], Float[Array, "..."] | None],
        block: tuple[Float[Array, "..."], Keys],
    ) -> tuple[tuple[Float[Array, "..."], Float[Array, "..."] | None], Float[Array, "..."]]:
        dq, dbias = carry
        dkv, keys = block

        def one_query_block(
            carry: tuple[Float[Array, "..."], Float[Array, "..."] | None],
            block: tuple[Float[Array, "..."], Rows, Int[Array, ""]],
        ) -> tuple[tuple[Float[Array, "..."], Float[Array, "..."] | None], Float[Array, "..."]]:
            dkv, dbias = carry
            dq, rows, index = block

            # With a narrow window the queries meet one band of the keys: add to that band alone.
            band, dkv_of_band, begin = keys, dkv, None
            if rule.band is not None:
                band, begin = keys_in_band(rows, keys, rule)
                dkv_of_band = lax.dynamic_slice_in_dim(dkv, begin, band.kv.shape[-2], -2)

            def step(sums: Gradients, masked: bool) -> Gradients:
                dq, dkv, dbias = sums
                new_dq, new_dkv, dscores = block_gradients(rows, band, rule, masked)
                if dbias is not None:
                    dbias = _add_to_bias(dbias, dscores, index, band)
                return Gradients(dq + new_dq, dkv + new_dkv, dbias)

            dq, dkv_of_band, dbias = run_where_seen(
                step, Gradients(dq, dkv_of_band, dbias), rows, band, rule
            )
            if begin is not None:
                dkv_of_band = lax.dynamic_update_slice_in_dim(dkv, dkv_of_band, begin, -2)
            return (dkv_of_band, dbias), dq

        (dkv, dbias), dq = scan_blocks(one_query_block, (dkv, dbias), (dq, rows, indices))
        return (dq, dbias), dkv

    (dq, dbias), dkv = scan_blocks(one_key_block, (sums.dq, sums.dbias), (sums.dkv, keys))
    return Gradients(dq, dkv, dbias)


def sink_gradient(sinks: Float[Array, " N"], rows: Rows) -> Float[Array, " N"]:
    """What these rows add to the gradient of their heads' sinks, in float32."""
    # A sink has a share of each row's softmax and no value, so it only takes weight from the
    # others: its gradient is -share * (dot product of the row's result and gradient).
    assert rows.lse is not None and rows.delta is not None
    K, G = rows.q.shape[2:4]
    wide = sinks.astype(jnp.float32).reshape(1, 1, K, G, 1)
    shares = softmax_weights(jnp.broadcast_to(wide, rows.lse.shape), rows.lse)
    return -jnp.sum(shares * rows.delta, (0, 1, 4)).reshape(K * G)


def block_gradients(
    rows: Rows, keys: Keys, rule: Rule, masked: bool
) -> tuple[Float[Array, "B K H G c"], Float[Array, "2 B K s H"], Float[Array, "B K s G c"]]:
    """Gradients of one block of queries, of one of keys and values, and of their scores.

    Scores stand with keys as rows, `[B, K, s, G, c]`, and the gradient of queries comes out
    transposed. So none of the five products needs a transpose of a block of scores.
    """
    assert rows.dout is not None and rows.lse is not None and rows.delta is not None
    k, v = keys.kv
    product = functools.partial(dot, precision=rule.precision)
    products = jnp.moveaxis(product("bksh,bkgth->bksgt", k, rows.q), 2, -1)
    scores, slope = to_scores(products, rows, keys, rule, masked)
    weights = softmax_weights(jnp.moveaxis(scores, -1, 2), rows.lse[:, :, None])
    dv = product("bksgt,bkgth->bksh", weights.astype(rows.dout.dtype), rows.dout)
    dweights = product("bksh,bkgth->bksgt", v, rows.dout)
    # The softmax's gradient: weights * (dweights - sum(weights * dweights)), and that sum is the
    # dot product of the result and its gradient, which was taken once for the whole row.
    dscores = weights * (dweights - rows.delta[:, :, None])
    dproducts = dscores if slope is None else dscores * jnp.moveaxis(slope, -1, 2)
    if rule.scale != 1:
        dproducts = dproducts * rule.scale
    dproducts = dproducts.astype(rows.q.dtype)
    dk = product("bksgt,bkgth->bksh", dproducts, rows.q)
    dq = product("bksh,bksgt->bkhgt", *widen_for_backend(k, dproducts))
    return dq, jnp.stack([dk, dv]), dscores


def _add_to_bias(
    dbias: Float[Array, "nq _ _ _ _ _"],
    dscores: Float[Array, "B K s G c"],
    index: Int[Array, ""],
    keys: Keys,
) -> Float[Array, "nq _ _ _ _ _"]:
    """`dbias` with one block's `dscores` added, summed over the axes that the bias broadcasts."""
    dscores = jnp.moveaxis(dscores, 2, -1)
    one_column = dbias.shape[-1] == 1
    shape = dbias.shape[1:-1] + (1 if one_column else dscores.shape[-1],)
    for axis, size in enumerate(shape):
        if size == 1:
            dscores = dscores.sum(axis, keepdims=True)
    begin = (index, 0, 0, 0, 0, 0 if one_column else keys.start)
    old = lax.dynamic_slice(dbias, begin, (1, *shape))
    return lax.dynamic_update_slice(dbias, old + dscores[None], begin)
