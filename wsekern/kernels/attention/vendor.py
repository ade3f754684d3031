"""Tiles of attention by the kernel that the plan took: the platform's, or our own blocks in jnp.

Public per-PE functions, without communication. A kernel for one platform joins them here. It must
return a tile's result and the log-sum-exp of each row's scores in float32, or serve only rows that
have one tile, as cuDNN's does.
"""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.attention import flash, splash, tile, tile_gradients
from wsekern.kernels.attention.mask import LOWEST, Keys, Rows, Rule
from wsekern.kernels.attention.tile_gradients import Gradients

# "full": every query sees every key. "diagonal": query and key t of the tile have one position.
TileKind = Literal["full", "diagonal", "any"]

_CUDNN: Literal["cudnn", "xla"] = "cudnn"  # jax.nn's name for it

_KERNELS: dict[str, ModuleType] = {"splash": splash, "pallas": flash}


def attend(
    rows: Rows,
    keys: Keys,
    rule: Rule,
    kind: TileKind,
    sinks: Float[Array, "K G"] | None,
    *,
    with_lse: bool,
) -> tuple[Float[Array, "nq B K G c H"], Float[Array, "nq B K G c"] | None]:
    """The result of rows that see the keys of one tile only, and the log-sum-exp of their scores.

    Args:
      rows: queries.
      keys: all keys that they see.
      rule: how they are scored.
      kind: how the tile lies.
      sinks: a score for each head that counts as one more key, without a value.
      with_lse: whether the log-sum-exps are needed, or a row may see no key. Without them some
        kernels do less. cuDNN's never gives them.
    """
    if rule.implementation == "cudnn":
        return _by_cudnn(rows, keys, rule, kind), None
    if rule.implementation in _KERNELS:
        kernel = _KERNELS[rule.implementation]
        with_lse = with_lse or sinks is not None
        out, lse = kernel.attend(rows, keys, _rule_of(rule, kind), with_lse=with_lse)
        if sinks is None:
            return out, lse
        assert lse is not None
        return tile.finish(_merge(None, out.astype(jnp.float32), lse), sinks, rows.q.dtype)
    return tile.finish(absorb(None, rows, keys, rule, kind), sinks, rows.q.dtype)


def absorb(
    running: tile.RunningSoftmax | None, rows: Rows, keys: Keys, rule: Rule, kind: TileKind
) -> tile.RunningSoftmax:
    """The softmax with one more tile of keys in it; None stands for one over no keys."""
    rule = _rule_of(rule, kind)
    if rule.implementation not in _KERNELS:
        return tile.absorb(running, rows, keys, rule)
    out, lse = _KERNELS[rule.implementation].attend(rows, keys, rule, with_lse=True)
    return _merge(running, out.astype(jnp.float32), lse)


def zero_gradients(rows: Rows, keys: Keys, rule: Rule) -> Gradients:
    """Gradients of zero in float32, for `add_gradients`."""
    zeros = tile_gradients.zero_gradients(rows, keys)
    if rule.implementation not in _KERNELS:
        return zeros
    return zeros._replace(dq=fabric.varying(jnp.zeros(rows.q.shape, jnp.float32)))


def add_gradients(sums: Gradients, rows: Rows, keys: Keys, rule: Rule, kind: TileKind) -> Gradients:
    """The gradients with the contribution of one tile of queries and one of keys added."""
    rule = _rule_of(rule, kind)
    if rule.implementation not in _KERNELS:
        return tile_gradients.add(sums, rows, keys, rule)
    dq, dkv = _KERNELS[rule.implementation].gradients(rows, keys, rule)
    dkv = jnp.stack(dkv)[None].astype(jnp.float32)
    return Gradients(sums.dq + dq.astype(jnp.float32), sums.dkv + dkv, None)


def gradients(rows: Rows, keys: Keys, rule: Rule, kind: TileKind) -> Gradients:
    """The gradients of queries and of the only tile of keys that they see.

    A platform's kernel gives them in the operands' dtype, our own blocks in float32. A Pallas
    kernel gives those of keys and of values apart, as it takes them.
    """
    if rule.implementation == "cudnn":
        return _by_cudnn_gradients(rows, keys, rule, kind)
    if rule.implementation in _KERNELS:
        dq, dkv = _KERNELS[rule.implementation].gradients(rows, keys, _rule_of(rule, kind))
        return Gradients(dq, (dkv,), None)
    return add_gradients(tile_gradients.zero_gradients(rows, keys), rows, keys, rule, kind)


def gradient_of_queries(grads: Gradients, rule: Rule) -> Float[Array, "nq B K G c H"]:
    """`grads.dq` with its axes as those of the queries, in float32."""
    dq = grads.dq.astype(jnp.float32)
    # The blocks in jnp leave it transposed.
    return dq.transpose(0, 1, 2, 4, 5, 3) if rule.implementation == "xla" else dq


def _rule_of(rule: Rule, kind: TileKind) -> Rule:
    if kind == "diagonal":
        return rule.on_the_diagonal()
    return rule.without_positions() if kind == "full" else rule


def _by_cudnn(rows: Rows, keys: Keys, rule: Rule, kind: TileKind) -> Float[Array, "nq B K G c H"]:
    operands = tile.unblock_queries(rows.q), *tile.unblock_keys(keys.kv)
    return tile.block_queries(_cudnn(*operands, rule, kind), rows.q.shape[2], len(rows.q))


def _by_cudnn_gradients(rows: Rows, keys: Keys, rule: Rule, kind: TileKind) -> Gradients:
    assert rows.dout is not None
    operands = tile.unblock_queries(rows.q), *tile.unblock_keys(keys.kv)
    # The vjp computes the forward pass again, for a log-sum-exp that is not rounded.
    _, pullback = jax.vjp(lambda q, k, v: _cudnn(q, k, v, rule, kind), *operands)
    dq, dk, dv = pullback(tile.unblock_queries(rows.dout))
    dq = tile.block_queries(dq, rows.q.shape[2], len(rows.q))
    return Gradients(dq, tile.block_keys(dk, dv, len(keys.kv)), None)


def _cudnn(
    q: Float[Array, "B Tt Nt H"],
    k: Float[Array, "B St Kt H"],
    v: Float[Array, "B St Kt H"],
    rule: Rule,
    kind: TileKind,
) -> Float[Array, "B Tt Nt H"]:
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=rule.scale,
        is_causal=kind == "diagonal",
        local_window_size=None if rule.window is None else (rule.window - 1, 0),
        implementation=_CUDNN,
    )


def _merge(
    running: tile.RunningSoftmax | None,
    out: Float[Array, "nq B K G c H"],
    lse: Float[Array, "nq B K G c"],
) -> tile.RunningSoftmax:
    # `out` is normalized: as a running softmax its weights sum to one, at a peak of `lse`. Of a row
    # that saw no key the log-sum-exp is -inf, and the weight 0.
    peak = jnp.maximum(lse, LOWEST if running is None else running.peak)
    weight = jnp.exp(lse - peak)
    if running is None:
        return tile.RunningSoftmax(out, weight, peak)
    fade = jnp.exp(running.peak - peak)
    return tile.RunningSoftmax(
        running.out * fade[..., None] + out * weight[..., None],
        running.total * fade + weight,
        peak,
    )
