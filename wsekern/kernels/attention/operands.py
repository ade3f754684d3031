"""The operands of attention: which arrays fit together, their layout on a grid, their blocks."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer

# How the work is ordered: on one PE, or by an algorithm; "zigzag" is the ring for causal queries.
Order = Literal["local", "allgather", "ulysses", "ring", "zigzag"]

Described = Array | jax.ShapeDtypeStruct  # `attention.explain` reads no values
HEADS = P(WAFERS, ROWS, COLS, None)  # [B, T, N, H]
_WHOLE_HEADS = P(WAFERS, ROWS, None, None)


class Floats(NamedTuple):
    """The operands that have gradients; arrays, or their `jax.ShapeDtypeStruct`."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, H]
    bias: Any  # [B, N, T, S], where each axis may have size 1, or None
    sinks: Any  # [N], or None


class Segments(NamedTuple):
    """The segment of each row of queries and of keys, [B, T] and [B, S]; both None without."""

    q: Any
    k: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaddedSizes:
    """Sizes of the whole operands that divide by the grid and by the blocks of a PE."""

    queries: int  # rows of q
    keys: int  # rows of k and v
    q_heads: int
    kv_heads: int  # repeated and padded
    repeats: int  # how often each head of keys and values stands


def pack(
    q: Float[Described, "B T N H"],
    k: Float[Described, "B S K H"],
    v: Float[Described, "B S K H"],
    bias: Float[Described, "..."] | None,
    sinks: Float[Described, " N"] | None,
    segment_ids: Int[Described, "B T"] | tuple[Int[Described, "B T"], Int[Described, "B S"]] | None,
) -> tuple[Floats, Segments]:
    """The operands of one call, checked, the bias with all its four axes.

    Raises:
      ValueError: shapes or dtypes do not fit one another.
    """
    _check_qkv(q, k, v)
    B, T, N, _ = q.shape
    S = k.shape[1]
    if bias is not None:
        _check_bias(bias, (B, N, T, S))
        if len(bias.shape) < 4:
            shape = (1,) * (4 - len(bias.shape)) + tuple(bias.shape)
            if isinstance(bias, jax.ShapeDtypeStruct):
                bias = jax.ShapeDtypeStruct(shape, bias.dtype)
            else:
                bias = jnp.expand_dims(bias, tuple(range(4 - bias.ndim)))
    if sinks is not None and sinks.shape != (N,):
        raise ValueError(
            f"attention: sinks is {sinks.shape}, it must be ({N},): one for each head of q"
        )
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    _check_segments(pair, (B, T), (B, S))
    return Floats(q, k, v, bias, sinks), Segments(*pair)


def specs(floats: Floats, segments: Segments, order: Order) -> tuple[Floats, Segments]:
    """The spec of each operand, None where there is no operand."""
    heads = (COLS, ROWS) if order == "ulysses" else COLS
    bias = None if floats.bias is None else _bias_spec(floats.bias, order)
    sinks = None if floats.sinks is None else P(heads)
    of_rows = Segments(*(None if x is None else P(WAFERS, ROWS) for x in segments))
    return Floats(HEADS, HEADS, HEADS, bias, sinks), of_rows


def lse_spec(order: Order) -> P:
    """The spec of the rows' log-sum-exps `[B, N, T]`, which stay in the algorithm's own order."""
    return P(WAFERS, (COLS, ROWS), None) if order == "ulysses" else P(WAFERS, COLS, ROWS)


def bias_shared_along(bias: Float[Described, "_ _ _ _"] | None, order: Order) -> tuple[str, ...]:
    """The axes of the wafer along which all PEs hold the same part of a whole `bias`."""
    if bias is None or order == "local":
        return ()
    split = [name for entry in _bias_spec(bias, order) for name in axes_of(entry)]
    return tuple(axis for axis in (WAFERS, ROWS, COLS) if axis not in split)


def pad(
    floats: Floats, segments: Segments, sizes: PaddedSizes, order: Order, wafer: Wafer | None
) -> tuple[Floats, Segments]:
    """The operands in their padded sizes, laid out on the wafer if there is one."""
    q, k, v, bias, sinks = floats
    q = layout.resize(q, 1, sizes.queries)
    k, v = (layout.resize(x, 1, sizes.keys) for x in (k, v))
    if wafer is not None and sizes.repeats > 1:
        q = layout.pad(q, _WHOLE_HEADS, wafer)
        k, v = (layout.repeat(x, sizes.repeats, 2, HEADS, wafer) for x in (k, v))
    q = layout.resize(q, 2, sizes.q_heads)
    k, v = (layout.resize(x, 2, sizes.kv_heads) for x in (k, v))
    if bias is not None:
        for axis, length in ((1, sizes.q_heads), (2, sizes.queries), (3, sizes.keys)):
            bias = bias if bias.shape[axis] == 1 else layout.resize(bias, axis, length)
    if sinks is not None:
        sinks = layout.resize(sinks, 0, sizes.q_heads)
    floats = Floats(q, k, v, bias, sinks)
    lengths = (sizes.queries, sizes.keys)
    segments = Segments(
        *(
            None if x is None else layout.resize(x, 1, length)
            for x, length in zip(segments, lengths, strict=True)
        )
    )
    if wafer is None:
        return floats, segments
    return jax.tree.map(
        lambda x, spec: layout.pad(x, spec, wafer),
        (floats, segments),
        specs(floats, segments, order),
    )


def crop(
    out: Float[Array, "_ _ _ H"], shape: tuple[int, ...], wafer: Wafer | None
) -> Float[Array, "B T N H"]:
    """The result without the rows and heads that `pad` added."""
    return out[:, : shape[1]] if wafer is None else layout.crop(out, shape, HEADS, wafer)


def block_segments(x: Int[Array, "B Tt"] | None, blocks: int) -> Int[Array, "n B c"] | None:
    """Segments in blocks of rows."""
    if x is None:
        return None
    return x.reshape(x.shape[0], blocks, -1).transpose(1, 0, 2)


def block_bias(
    bias: Float[Array, "_ _ _ _"] | None, kv_heads: int, blocks: int
) -> Float[Array, "{blocks} _ _ _ _ _"] | None:
    """A PE's bias `[B, N, T, S]` as `[n, B, K, G, c, S]`; axes of size 1 keep it.

    A bias that is the same for all rows is repeated for each block.
    """
    if bias is None:
        return None
    B, N, T, S = bias.shape
    heads = (1, 1) if N == 1 else (kv_heads, N // kv_heads)
    if T == 1:
        return jnp.broadcast_to(bias.reshape(1, B, *heads, 1, S), (blocks, B, *heads, 1, S))
    bias = bias.reshape(B, *heads, blocks, T // blocks, S)
    return bias.transpose(3, 0, 1, 2, 4, 5)


def unblock_bias(
    dbias: Float[Array, "n _ _ _ _ _"], shape: tuple[int, ...]
) -> Float[Array, "_ _ _ _"]:
    """The gradient of a bias of this `shape` from its blocks' gradient, repeated blocks summed."""
    if shape[2] == 1:
        return dbias.sum(0).reshape(shape)
    return dbias.transpose(1, 2, 3, 0, 4, 5).reshape(shape)


def _bias_spec(bias: Float[Described, "_ _ _ _"], order: Order) -> P:
    along: list[Any] = [WAFERS, COLS, ROWS, None]
    if order == "ulysses":
        along = [WAFERS, (COLS, ROWS), None, None]
    return P(*(axis if n > 1 else None for axis, n in zip(along, bias.shape, strict=True)))


def _check_qkv(
    q: Shaped[Described, "..."], k: Shaped[Described, "..."], v: Shaped[Described, "..."]
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(
                f"attention: {name} is {x.shape}, it must have four dimensions: batch, sequence, "
                "heads, head size"
            )
    if k.shape != v.shape:
        raise ValueError(f"attention: k is {k.shape} and v is {v.shape}: they must be alike")
    for axis, sizes in ((0, "batches"), (3, "head sizes")):
        if q.shape[axis] != k.shape[axis]:
            raise ValueError(
                f"attention: q is {q.shape} and k is {k.shape}: their {sizes} "
                f"({q.shape[axis]} and {k.shape[axis]}) must be equal"
            )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention: q is {q.shape} and k is {k.shape}: neither may be empty")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q has {q.shape[2]} heads and k has {k.shape[2]}: the heads of q must be a "
            "multiple of the heads of k"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q is {q.dtype}, k is {k.dtype} and v is {v.dtype}: cast them to one dtype"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q, k and v are {q.dtype}; cast them to a floating dtype")


def _check_bias(bias: Shaped[Described, "..."], scores: tuple[int, int, int, int]) -> None:
    full = (1,) * (4 - len(bias.shape)) + tuple(bias.shape)
    if len(full) > 4 or any(x not in (1, n) for x, n in zip(full, scores, strict=True)):
        raise ValueError(
            f"attention: bias is {bias.shape}, it must broadcast to {scores}: batch, heads, "
            "queries, keys"
        )


def _check_segments(
    pair: tuple[Shaped[Described, "..."] | None, ...],
    of_queries: tuple[int, int],
    of_keys: tuple[int, int],
) -> None:
    if len(pair) != 2 or (pair[0] is None) != (pair[1] is None):
        raise ValueError(
            "attention: segment_ids is one array for queries and keys, or a tuple of one for each"
        )
    shapes, names = (of_queries, of_keys), ("queries", "keys")
    for ids, shape, name in zip(pair, shapes, names, strict=True):
        if ids is None:
            continue
        if ids.shape != shape:
            raise ValueError(
                f"attention: segment_ids is {ids.shape} for {name} of {shape}: it must have one id "
                "for each row; give a pair where queries and keys differ"
            )
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"attention: segment_ids are {ids.dtype}; cast them to int32")
