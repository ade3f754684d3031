"""Attention of the newest tokens to a key-value cache whose tokens lie along y.

Each row of PEs attends to the tokens that it holds, then the rows' softmaxes are merged, as in
T. Dao et al., "Flash-Decoding for long-context inference", 2023. Sinks: G. Xiao et al., "Efficient
Streaming Language Models with Attention Sinks", 2024, learned as in gpt-oss. The soft cap is
Gemma 2's.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Shaped

from wsekern import fabric
from wsekern.kernels.attention.kv_balance import Balance
from wsekern.kernels.attention.kv_cache import NEW, SEQUENCES, SLOTS, KVCache
from wsekern.kernels.attention.kv_rows import Slots
from wsekern.kernels.attention.mask import LOWEST
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """What every PE does."""

    scale: float
    soft_cap: float | None
    window: int | None
    precision: lax.PrecisionLike
    group: int  # query heads for each head of the cache
    balance: Balance


def decode_attention(
    q: Float[Array, "B T N H"],
    cache: KVCache,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "B T N H"]:
    """`softmax(scale q k^T) v` of each sequence's last T tokens over the tokens in its cache.

    The cache already has the keys and values of the T tokens; each of them sees itself and those
    before it. Query head n attends to head n // (N / K) of the cache. The softmax is in float32.
    There is no gradient.

    Algorithm: split keys, as in Flash-Decoding. Every PE attends to its own slots, ceil(capacity /
    height) of them, however many are filled, so the time depends on the capacity and not on the
    length. Then two all-reduces along y follow one another: the highest scores, B T N words, and
    the weighted sums, B T N (H + 1) words, in float32, with B and N a PE's share of sequences and
    heads. Each costs what `fabric.all_reduce` does for its size; XLA's on p devices bring
    2 (p - 1) / p of it. A PE holds two arrays of B T N slots scores; on a CPU, XLA also widens
    16-bit keys and values.

    Args:
      q: queries, laid out `P("wafer", None, "x", None)`, the same in every row of PEs; so is the
        result. The result is 0 for a sequence without tokens, and, where it has fewer than T, for
        those before its first.
      cache: the keys and values; the attention runs on the wafer that it lives on.
      scale: what the products are multiplied by; by default `H ** -0.5`.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      sinks: for each head one more score that counts in the softmax's denominator only.
      precision: of both products, as in `jax.lax.dot_general`.

    Raises:
      ValueError: shapes or dtypes do not fit the cache, `soft_cap` is not positive, T is more than
        the cache's `chunk` and it has a window, or it is differentiated.
    """
    _check(q, cache, soft_cap, sinks)
    plan = DecodePlan(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        soft_cap=None if soft_cap is None else float(soft_cap),
        window=cache.window,
        precision=precision,
        group=q.shape[2] // (cache.kv_heads * cache.repeats),
        balance=cache.balance,
    )
    if sinks is None:
        sinks = jnp.full(q.shape[2], -jnp.inf, jnp.float32)
    return _decode_attention(q, cache.k, cache.v, cache.lengths, sinks, plan, cache.wafer)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "_ _ slots H"],
    v: Float[Array, "_ _ slots H"],
    lengths: Int[Array, " B"],
    sinks: Float[Array, " N"],
    plan: DecodePlan,
    wafer: Wafer | None,
) -> Float[Array, "B T N H"]:
    if wafer is None:
        return _local(q, k, v, lengths, sinks, plan)
    shape, heads = q.shape, k.shape[1] * plan.group
    q = _lay_out(q, 2, heads, NEW, wafer)
    sinks = _lay_out(sinks, 0, heads, P(COLS), wafer)
    lengths = layout.pad(lengths, SEQUENCES, wafer)
    specs = (NEW, SLOTS, SLOTS, SEQUENCES, P(COLS))
    run = wafer.map(functools.partial(_per_pe, plan=plan), in_specs=specs, out_specs=NEW)
    return layout.crop(run(q, k, v, lengths, sinks), shape, NEW, wafer)


@_decode_attention.defjvp
def _no_gradient(
    plan: DecodePlan, wafer: Wafer | None, primals: tuple, tangents: tuple
) -> NoReturn:
    raise ValueError("decode_attention has no gradient; train with wsekern.attention")


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnums=5, inline=True)
def _local(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    lengths: Int[Array, " B"],
    sinks: Float[Array, " N"],
    plan: DecodePlan,
) -> Float[Array, "B T N H"]:
    return _attend(q, k, v, lengths, sinks, plan, 0, lambda x, op: x)


def _per_pe(
    q: Float[Array, "B T Nt H"],
    k: Float[Array, "B Kt slots H"],
    v: Float[Array, "B Kt slots H"],
    lengths: Int[Array, " B"],
    sinks: Float[Array, " Nt"],
    plan: DecodePlan,
) -> Float[Array, "B T Nt H"]:
    def reduce_rows(x: Float[Array, "*shape"], op: fabric.Op) -> Float[Array, "*shape"]:
        return fabric.all_reduce(x, ROWS, op)

    return _attend(q, k, v, lengths, sinks, plan, fabric.axis_index(ROWS), reduce_rows)


def _attend(
    q: Float[Array, "B T N H"],
    k: Slots,
    v: Slots,
    lengths: Int[Array, " B"],
    sinks: Float[Array, " N"],
    plan: DecodePlan,
    row: Int[Array, ""] | int,
    reduce_rows: Callable[[Float[Array, "..."], fabric.Op], Float[Array, "..."]],
) -> Float[Array, "B T N H"]:
    B, T, N, H = q.shape
    K, G = N // plan.group, plan.group
    # Tokens and heads that share keys are the rows of one product: XLA copies no keys for it.
    q = q.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    scores = _dot("bkrh,bksh->bkrs", q, k, plan) * plan.scale
    if plan.soft_cap is not None:
        scores = plan.soft_cap * jnp.tanh(scores / plan.soft_cap)
    visible = jnp.repeat(_visible(lengths, row, T, plan), G, axis=1)[:, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    # Values are weighted against this row's highest score, before the highest of all rows is known;
    # the sums are brought to that one afterwards. So the product need not wait for the reduction.
    row_peak = jnp.maximum(scores.max(-1, keepdims=True), LOWEST)
    weights = jnp.exp(scores - row_peak)
    out = _dot("bkrs,bksh->bkrh", weights.astype(v.dtype), v, plan)
    out = jnp.concatenate([out, weights.sum(-1, keepdims=True)], -1)
    sinks = jnp.tile(sinks.astype(jnp.float32).reshape(1, K, G, 1), (1, 1, T, 1))
    peak = jnp.maximum(reduce_rows(row_peak, "max"), sinks)
    out = reduce_rows(out * jnp.exp(row_peak - peak), "sum")
    total = out[..., H:] + jnp.exp(sinks - peak)
    # Not `total > 0`: a total that is NaN must give NaN.
    out = jnp.where(total == 0, 0, out[..., :H] / jnp.where(total == 0, 1, total))
    return out.reshape(B, K, T, G, H).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H).astype(q.dtype)


def _dot(
    subscripts: str, a: Float[Array, "B K r _"], b: Slots, plan: DecodePlan
) -> Float[Array, "B K r _"]:
    return jnp.einsum(
        subscripts, a, b, precision=plan.precision, preferred_element_type=jnp.float32
    )


def _visible(
    lengths: Int[Array, " B"], row: Int[Array, ""] | int, T: int, plan: DecodePlan
) -> Bool[Array, "B {T} slots"]:
    """Whether each of the last T tokens sees the token in each slot of this row."""
    first, next_first = (plan.balance.first(lengths, r)[:, None] for r in (row, row + 1))
    beyond = lengths[:, None] - T + 1 + jnp.arange(T)[None]  # the position behind each token
    end = jnp.minimum(next_first, beyond)
    if plan.window is not None:
        begin = jnp.maximum(beyond - plan.window - first, 0)
    else:
        begin = jnp.zeros_like(end)
    offsets = plan.balance.offsets(lengths, row)[:, None]
    return (offsets >= begin[..., None]) & (offsets < (end - first)[..., None])


def _lay_out(
    x: Shaped[Array, "..."], axis: int, length: int, spec: P, wafer: Wafer
) -> Shaped[Array, "..."]:
    """`x` with `length` along one axis, then padded and laid out by `spec`."""
    if length == x.shape[axis]:
        return layout.pad(x, spec, wafer)
    # Whole along the axis first: Explicit axes would not resize a dimension that is split.
    whole = P(*(entry if d != axis else None for d, entry in enumerate(spec)))
    x = layout.pad(x, whole, wafer)
    return layout.pad(layout.resize(x, axis, length), spec, wafer)


def _check(
    q: Shaped[Array, "..."],
    cache: KVCache,
    soft_cap: float | None,
    sinks: Shaped[Array, "..."] | None,
) -> None:
    if q.ndim != 4:
        raise ValueError(
            f"decode_attention: q is {q.shape}, it must have four dimensions: batch, the last "
            "tokens, heads, head size"
        )
    for axis, size, name in (
        (0, len(cache.lengths), "sequences"),
        (3, cache.k.shape[3], "features a head"),
    ):
        if q.shape[axis] != size:
            raise ValueError(
                f"decode_attention: q is {q.shape}: it has {q.shape[axis]} {name}, the cache {size}"
            )
    heads = cache.kv_heads * cache.repeats
    if not q.size or q.shape[2] % heads:
        raise ValueError(
            f"decode_attention: q is {q.shape}: its heads ({q.shape[2]}) must be a multiple of the "
            f"{heads} of the cache (kv_heads={cache.kv_heads}, made for heads={cache.heads})"
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
