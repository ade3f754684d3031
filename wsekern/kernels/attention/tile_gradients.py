"""This file is the gradient of attention inside one PE, whose scores it computes anew.

Public per-PE functions, without communication; blocks as in `tile_attention`. T. Dao,
"FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.attention.heads import few_at_once
from wsekern.kernels.attention.mask import Keys, Rows, Rule, near, scored, where_seen
from wsekern.kernels.attention.tile import dot, scan
from wsekern.wafer.limits import widen_for_backend


class Gradients(NamedTuple):
    """Gradients under way, in float32."""

    dq: Float[Array, "nq B K H G c"]  # transposed, as the product that makes it leaves it
    dkv: Float[Array, "nk 2 B K s H"]
    dbias: Float[Array, "nq _ _ _ _ _"] | None


def nothing_yet(rows: Rows, keys: Keys) -> Gradients:
    """Gradients of zero."""
    dq = jnp.zeros(rows.q.swapaxes(-3, -1).swapaxes(-2, -1).shape, jnp.float32)
    dbias = None if rows.bias is None else jnp.zeros(rows.bias.shape, jnp.float32)
    return fabric.varying(Gradients(dq, jnp.zeros(keys.kv.shape, jnp.float32), dbias))


def add(so_far: Gradients, rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """The gradients with what one tile of queries and one of keys add to them."""
    return few_at_once(functools.partial(_add_heads, rule=rule), so_far, rows, keys, rule)


def _add_heads(so_far: Gradients, rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    blocks = jnp.arange(rows.q.shape[0])

    def one_key_block(carry, block):
        dq, dbias = carry
        dkv, keys = block

        def one_query_block(carry, block):
            dkv, dbias = carry
            dq, rows, index = block

            met, part, at = keys, dkv, None
            if rule.band is not None:
                met, at = near(rows, keys, rule)
                part = lax.dynamic_slice_in_dim(dkv, at, met.kv.shape[-2], -2)

            def step(so_far, masked):
                dq, dkv, dbias = so_far
                new, dscores = of_block(rows, met, rule, masked)
                if dbias is not None:
                    dbias = _add_columns(dbias, dscores, index, met)
                return Gradients(dq + new[0], dkv + new[1], dbias)

            dq, part, dbias = where_seen(step, Gradients(dq, part, dbias), rows, met, rule)
            if at is not None:
                part = lax.dynamic_update_slice_in_dim(dkv, part, at, -2)
            return (part, dbias), dq

        (dkv, dbias), dq = scan(one_query_block, (dkv, dbias), (dq, rows, blocks))
        return (dq, dbias), dkv

    (dq, dbias), dkv = scan(one_key_block, (so_far.dq, so_far.dbias), (so_far.dkv, keys))
    return Gradients(dq, dkv, dbias)


def of_block(
    rows: Rows, keys: Keys, rule: Rule, masked: bool
) -> tuple[tuple[Float[Array, "B K H G c"], Float[Array, "2 B K s H"]], jax.Array]:
    """What one block of queries and one of keys add to their gradients, and that of the scores.

    Scores stand with keys as rows, `[B, K, s, G, c]`, and the gradient of queries comes transposed:
    so three of the five products need no transpose of a block of scores, and the others none.
    """
    assert rows.dout is not None and rows.lse is not None and rows.dot is not None
    k, v = keys.kv
    products = jnp.moveaxis(dot("bksh,bkgth->bksgt", k, rows.q), 2, -1)
    scores, slope = scored(products, rows, keys, rule, masked)
    weights = jnp.exp(jnp.moveaxis(scores, -1, 2) - rows.lse[:, :, None])
    dv = dot("bksgt,bkgth->bksh", weights.astype(rows.dout.dtype), rows.dout)
    dweights = dot("bksh,bkgth->bksgt", v, rows.dout)
    dscores = weights * (dweights - rows.dot[:, :, None])
    dproducts = dscores if slope is None else dscores * jnp.moveaxis(slope, -1, 2)
    if rule.scale != 1:
        dproducts = dproducts * rule.scale
    dproducts = dproducts.astype(rows.q.dtype)
    dk = dot("bksgt,bkgth->bksh", dproducts, rows.q)
    dq = dot("bksh,bksgt->bkhgt", *widen_for_backend(k, dproducts))
    return (dq, jnp.stack([dk, dv])), dscores


def _add_columns(dbias, dscores, index, keys):
    dscores = jnp.moveaxis(dscores, 2, -1)
    shape = dbias.shape[1:-1] + (1 if dbias.shape[-1] == 1 else dscores.shape[-1],)
    for axis, size in enumerate(shape):
        if size == 1:
            dscores = dscores.sum(axis, keepdims=True)
    at = (index, 0, 0, 0, 0, 0 if dbias.shape[-1] == 1 else keys.start)
    old = lax.dynamic_slice(dbias, at, (1, *shape))
    return lax.dynamic_update_slice(dbias, old + dscores[None], at)
