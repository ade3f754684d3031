"""This file is attention of the newest tokens to a cache whose tokens lie along y.

Each row of PEs attends to the tokens that it holds; the rows' softmaxes are then put together, as
in T. Dao et al., "Flash-Decoding for long-context inference", 2023. Sinks: G. Xiao et al.,
"Efficient Streaming Language Models with Attention Sinks", 2024, learned as in gpt-oss. The soft
cap is Gemma 2's.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.attention.kv_balance import Balance
from wsekern.kernels.attention.kv_cache import NEW, SEQUENCES, SLOTS, KVCache
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS

_LOWEST = -1e30  # no score is lower; finite, so that a difference of two such is a number


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    scale: float
    soft_cap: float | None
    window: int | None
    group: int  # heads of queries that one head of the cache serves
    balance: Balance


def decode_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` of each sequence's last T tokens over what its cache holds.

    The tokens' own keys and values are in the cache already; each sees itself and those before it.
    Head n of the queries attends to head n // (N / K) of the cache. The softmax is in float32.
    Every PE attends to its own slots, ceil(capacity / height) of them, however many are filled.
    Two all-reduces along y follow, one after the other: with B and N its share of sequences and
    heads, of B T N and of B T N (H + 1) words (float32), by what `fabric.all_reduce` takes for so
    many; XLA's on p devices bring 2 (p - 1) / p of them. A PE holds two arrays of B T N slots
    scores; on a CPU XLA widens 16-bit keys and values besides. There is no gradient.

    Args:
      q: queries, laid out `P("wafer", None, "x", None)`, the same in every row of PEs; so is the
        result. Where a sequence has no token (or fewer than T: of those before its first) it is 0.
      cache: where it lives, there the attention runs.
      scale: what the scores are multiplied by; by default `H ** -0.5`.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
      sinks: a score for each head that joins the softmax's sum and has no value.

    Raises:
      ValueError: shapes or dtypes do not fit the cache, `soft_cap` is not positive, or T is more
        than the cache's `chunk` and it has a window.
    """
    _check(q, cache, soft_cap, sinks)
    plan = _Plan(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        window=cache.window,
        group=q.shape[2] // (cache.kv_heads * cache.repeats),
        balance=cache.balance,
    )
    if sinks is None:
        sinks = jnp.full(q.shape[2], -jnp.inf, jnp.float32)
    return _decode_attention(q, cache.k, cache.v, cache.lengths, sinks, plan, cache.wafer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _decode_attention(q, k, v, lengths, sinks, plan, wafer):
    if wafer is None:
        return _local(q, k, v, lengths, sinks, plan)
    shape, heads = q.shape, k.shape[1] * plan.group
    q = _grown(q, 2, heads, NEW, wafer)
    sinks = _grown(sinks, 0, heads, P(COLS), wafer)
    lengths = layout.pad(lengths, SEQUENCES, wafer)
    specs = (NEW, SLOTS, SLOTS, SEQUENCES, P(COLS))
    run = wafer.map(functools.partial(_per_pe, plan=plan), in_specs=specs, out_specs=NEW)
    return layout.crop(run(q, k, v, lengths, sinks), shape, NEW, wafer)


@_decode_attention.defjvp
def _no_gradient(plan, wafer, primals, tangents):
    raise ValueError("decode_attention has no gradient; train with wsekern.attention")


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def _local(q, k, v, lengths, sinks, plan):
    return _attended(q, k, v, lengths, sinks, plan, 0, lambda x, op: x)


def _per_pe(
    q: Float[Array, "B T Nt H"],
    k: Float[Array, "B Kt slots H"],
    v: Float[Array, "B Kt slots H"],
    lengths: Int[Array, "B"],
    sinks: Float[Array, "Nt"],
    plan: _Plan,
) -> Float[Array, "B T Nt H"]:
    def over_rows(x, op):
        return fabric.all_reduce(x, ROWS, op)

    return _attended(q, k, v, lengths, sinks, plan, fabric.axis_index(ROWS), over_rows)


def _attended(q, k, v, lengths, sinks, plan, row, over_rows: Callable):
    B, T, N, H = q.shape
    K, G = N // plan.group, plan.group
    # Tokens and heads that share keys are the rows of one product: XLA copies no keys for it.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    scores = _dot("bkrh,bksh->bkrs", q, k) * plan.scale
    if plan.soft_cap is not None:
        scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
    seen = jnp.repeat(_seen(lengths, row, T, plan), G, axis=1)[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    # The values are weighted before the highest score of all rows is known.
    mine = jnp.maximum(scores.max(-1, keepdims=True), _LOWEST)
    weights = jnp.exp(scores - mine)
    out = _dot("bkrs,bksh->bkrh", weights.astype(v.dtype), v)
    out = jnp.concatenate([out, weights.sum(-1, keepdims=True)], -1)
    sinks = jnp.tile(sinks.astype(jnp.float32).reshape(1, K, G, 1), (1, 1, T, 1))
    peak = jnp.maximum(over_rows(mine, "max"), sinks)
    out = over_rows(out * jnp.exp(mine - peak), "sum")
    total = out[..., H:] + jnp.exp(sinks - peak)
    out = jnp.where(total > 0, out[..., :H] / total, 0)
    return out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)


def _dot(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _seen(lengths, row, T, plan):
    """Whether each of the last T tokens sees the token of each slot, `[B, T, slots]`."""
    first, end = (plan.balance.first(lengths, r)[:, None] for r in (row, row + 1))
    beyond = lengths[:, None] - T + 1 + jnp.arange(T)[None]  # the position behind each token
    last = jnp.minimum(end, beyond)
    if plan.window is not None:
        begin = jnp.maximum(beyond - plan.window - first, 0)
    else:
        begin = jnp.zeros_like(last)
    offsets = plan.balance.offsets(lengths, row)[:, None]
    return (offsets >= begin[..., None]) & (offsets < (last - first)[..., None])


def _grown(x, axis, length, spec, wafer):
    if length == x.shape[axis]:
        return layout.pad(x, spec, wafer)
    # of a whole dimension: Explicit axes would not grow what is split
    x = layout.pad(x, P(*(entry if d != axis else None for d, entry in enumerate(spec))), wafer)
    return layout.pad(layout.resize(x, axis, length), spec, wafer)


def _check(q, cache, soft_cap, sinks):
    if q.ndim != 4:
        raise ValueError(
            f"decode_attention: q is {q.shape}, it must have four dimensions: batch, the last "
            "tokens, heads, head size"
        )
    for axis, size, what in (
        (0, len(cache.lengths), "sequences"),
        (3, cache.k.shape[3], "features a head"),
    ):
        if q.shape[axis] != size:
            raise ValueError(
                f"decode_attention: q is {q.shape}: it has {q.shape[axis]} {what}, the cache {size}"
            )
    held = cache.kv_heads * cache.repeats
    if not q.size or q.shape[2] % held:
        raise ValueError(
            f"decode_attention: q is {q.shape}: its heads ({q.shape[2]}) must be a multiple of the "
            f"{held} of the cache (kv_heads={cache.kv_heads}, made for heads={cache.heads})"
        )
    if q.dtype != cache.k.dtype:
        raise ValueError(
            f"decode_attention: q is {q.dtype}, the cache is {cache.k.dtype}: cast one of them"
        )
    if cache.window is not None and q.shape[1] > cache.chunk:
        raise ValueError(
            f"decode_attention: q has {q.shape[1]} tokens, the cache keeps a window for "
            f"{cache.chunk} at once; make it with chunk={q.shape[1]}"
        )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"decode_attention: soft_cap is {soft_cap}, it must be positive")
    if sinks is not None and jnp.shape(sinks) != q.shape[2:3]:
        raise ValueError(
            f"decode_attention: sinks is {jnp.shape(sinks)}, it must be one for each of the "
            f"{q.shape[2]} heads of q"
        )
