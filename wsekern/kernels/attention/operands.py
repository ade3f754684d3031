"""This file is what goes into attention: which arrays fit together, and how they lie on a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer

if TYPE_CHECKING:
    from wsekern.kernels.attention.plan import AttentionOptions, AttentionPlan

HEADS = P(WAFERS, ROWS, COLS, None)  # [B, T, N, H]
_WHOLE_HEADS = P(WAFERS, ROWS, None, None)
_KNOWN = ("auto", "ring", "allgather", "ulysses")


class Floats(NamedTuple):
    """The operands that have gradients."""

    q: Any
    k: Any
    v: Any
    bias: Any  # [B, N, T, S], any of them 1, or None
    sinks: Any  # [N], or None


class Segments(NamedTuple):
    """The segment of each row of queries and of keys, [B, T] and [B, S], or None."""

    q: Any
    k: Any


def specs(floats: Floats, segments: Segments, plan: AttentionPlan) -> tuple[Floats, Segments]:
    """How the operands lie."""
    heads = (COLS, ROWS) if plan.order == "ulysses" else COLS
    bias = None if floats.bias is None else _bias_spec(floats.bias, plan.order)
    sinks = None if floats.sinks is None else P(heads)
    of_rows = Segments(*(None if x is None else P(WAFERS, ROWS) for x in segments))
    return Floats(HEADS, HEADS, HEADS, bias, sinks), of_rows


def lse_spec(plan: AttentionPlan) -> P:
    """How a row's log-sum-exps `[B, N, T]` lie; in the ring's own order of rows."""
    return P(WAFERS, (COLS, ROWS), None) if plan.order == "ulysses" else P(WAFERS, COLS, ROWS)


def shared_axes(bias: Any, order: str) -> tuple[str, ...]:
    """Along which axes all PEs have the same of a whole `bias`."""
    if bias is None or order == "local":
        return ()
    named = [name for entry in _bias_spec(bias, order) for name in axes_of(entry)]
    return tuple(axis for axis in (WAFERS, ROWS, COLS) if axis not in named)


def padded(
    floats: Floats, segments: Segments, plan: AttentionPlan, wafer: Wafer
) -> tuple[Floats, Segments]:
    """The operands in sizes that divide by the grid and by the blocks of a PE."""
    q, k, v, bias, sinks = floats
    q = layout.resize(q, 1, plan.rows)
    k, v = (layout.resize(x, 1, plan.columns) for x in (k, v))
    if plan.repeats > 1:  # of whole heads: Explicit axes would not repeat what is split
        q, k, v = (layout.pad(x, _WHOLE_HEADS, wafer) for x in (q, k, v))
        k, v = (jnp.repeat(x, plan.repeats, axis=2) for x in (k, v))
    q = layout.resize(q, 2, plan.q_heads)
    k, v = (layout.resize(x, 2, plan.kv_heads) for x in (k, v))
    if bias is not None:
        for axis, length in ((1, plan.q_heads), (2, plan.rows), (3, plan.columns)):
            bias = bias if bias.shape[axis] == 1 else layout.resize(bias, axis, length)
    if sinks is not None:
        sinks = layout.resize(sinks, 0, plan.q_heads)
    grown = Floats(q, k, v, bias, sinks)
    rows = Segments(
        *(
            None if x is None else layout.resize(x, 1, length)
            for x, length in zip(segments, (plan.rows, plan.columns), strict=True)
        )
    )
    return jax.tree.map(
        lambda x, spec: layout.pad(x, spec, wafer), (grown, rows), specs(grown, rows, plan)
    )


def blocked_segments(x: jax.Array | None, blocks: int) -> jax.Array | None:
    """Segments `[B, T]` as `[n, B, c]`."""
    if x is None:
        return None
    return x.reshape(x.shape[0], blocks, -1).transpose(1, 0, 2)


def blocked_bias(bias: jax.Array | None, kv_heads: int, blocks: int) -> jax.Array | None:
    """A PE's bias `[B, N, T, S]` as `[n, B, K, G, c, S]`, its sizes of 1 kept."""
    if bias is None:
        return None
    B, N, T, S = bias.shape
    heads = (1, 1) if N == 1 else (kv_heads, N // kv_heads)
    if T == 1:
        return jnp.broadcast_to(bias.reshape(1, B, *heads, 1, S), (blocks, B, *heads, 1, S))
    bias = bias.reshape(B, *heads, blocks, T // blocks, S)
    return bias.transpose(3, 0, 1, 2, 4, 5)


def unblocked_bias(dbias: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `blocked_bias`, and the sum of what it repeated."""
    if shape[2] == 1:
        return dbias.sum(0).reshape(shape)
    return dbias.transpose(1, 2, 3, 0, 4, 5).reshape(shape)


def checked(
    q: Any, k: Any, v: Any, bias: Any, sinks: Any, segment_ids: Any, options: AttentionOptions
) -> tuple[Floats, Segments]:
    """The operands together.

    Raises:
      ValueError: what `attention` says.
    """
    _check_shapes(q, k, v)
    _check_options(options)
    B, T, N, _ = q.shape
    S = k.shape[1]
    if bias is not None:
        whole = (B, N, T, S)
        full = (1,) * (4 - bias.ndim) + tuple(bias.shape)
        if bias.ndim > 4 or any(x not in (1, n) for x, n in zip(full, whole, strict=True)):
            raise ValueError(
                f"attention: bias is {bias.shape}, it must broadcast to {whole}: batch, heads, "
                "queries, keys"
            )
        bias = bias if bias.ndim == 4 else bias.reshape(full)
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(
            f"attention: sinks is {sinks.shape}, it must be ({N},): one for each head of q"
        )
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    _check_segments(pair, (B, T), (B, S))
    return Floats(q, k, v, bias, sinks), Segments(*pair)


def _check_shapes(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} is {x.shape}, it must have four dimensions: batch, sequence, "
                "heads, head size"
            )
    if k.shape != v.shape:
        raise ValueError(f"attention: k is {k.shape} and v is {v.shape}: they must be alike")
    for axis, what in ((0, "batches"), (3, "head sizes")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(
                f"attention: q is {q.shape} and k is {k.shape}: their {what} "
                f"({q.shape[axis]} and {k.shape[axis]}) must be equal"
            )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention: q is {q.shape} and k is {k.shape}: neither may be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q has {q.shape[2]} heads and k has {k.shape[2]}: those of q must be a "
            "multiple of those of k"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q is {q.dtype}, k is {k.dtype} and v is {v.dtype}: cast them to one dtype"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q, k and v are {q.dtype}; cast them to a floating dtype")


def _check_options(options):
    if options.algorithm not in _KNOWN:
        known = ", ".join(map(repr, _KNOWN))
        raise ValueError(f"attention: algorithm={options.algorithm!r} is not one of {known}")
    if options.window is not None and options.window < 1:
        raise ValueError(
            f"attention: window={options.window} must be 1 or more: it counts the query's own key"
        )
    if options.window is not None and not options.causal:
        raise ValueError(
            f"attention: window={options.window} looks back from each query; it needs causal=True"
        )
    if options.soft_cap is not None and not options.soft_cap > 0:
        raise ValueError(f"attention: soft_cap={options.soft_cap} must be positive")


def _check_segments(pair, *wanted):
    if len(pair) != 2 or (pair[0] is None) != (pair[1] is None):
        raise ValueError(
            "attention: segment_ids is one array for queries and keys, or a tuple of one for each"
        )
    for ids, shape, what in zip(pair, wanted, ("queries", "keys"), strict=True):
        if ids is None:
            continue
        if ids.shape != shape:
            raise ValueError(
                f"attention: segment_ids is {ids.shape} for {what} of {shape}: it must have one id "
                "for each row; give a pair where queries and keys differ"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"attention: segment_ids are {ids.dtype}; cast them to int32")


def _bias_spec(bias: jax.Array, order: str) -> P:
    along: list[Any] = [WAFERS, COLS, ROWS, None]
    if order == "ulysses":
        along = [WAFERS, (COLS, ROWS), None, None]
    return P(*(axis if n > 1 else None for axis, n in zip(along, bias.shape, strict=True)))
