"""The operations of language models: products, attention, decoding, experts, norms and losses."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import wsekern as wk
from benchmarks.operations.case import OperandShapes, OperationCase
from wsekern.kernels.attention.kv_cache import SLOTS
from wsekern.kernels.attention.pages import KEYS, SCALES, TOKENS, VALUES
from wsekern.wafer.wafer import Wafer

_B, _T, _N, _K, _H = 4, 1024, 32, 16, 128  # of attention
_D, _F, _V = 1024, 2048, 8192  # features of a token, of the hidden layer, words
_ROWS = P("wafer", "y", "x", None)  # of queries, keys and values
_NEW = P("wafer", None, "x", None)  # of tokens that are decoded
_TOKENS = P("wafer", "y")


def cases(operands: OperandShapes) -> Iterator[OperationCase]:
    """All of them."""
    yield from _products(operands)
    yield from _attention(operands)
    yield from _decoding(operands)
    yield from _experts(operands)
    yield from _dense(operands)


def _has_wafers(wafer: Wafer) -> bool:
    return wafer.wafers > 1


def _has_few_pes(wafer: Wafer) -> bool:
    return _K % (wafer.height * wafer.width) == 0  # to each its heads of keys


def _products(operands: OperandShapes) -> Iterator[OperationCase]:
    x, up, down = operands.floats(_T, _D), operands.floats(_D, _F), operands.floats(_F, _D)
    batch, bias = operands.floats(_B, _T, _D), operands.floats(_F, spec=P("x"))
    int8 = operands.integers(_D, _F, spec=P("y", "x"), dtype=jnp.int8)
    yield OperationCase("matmul", wk.matmul, (x, up))
    for algorithm in ("allgather", "summa", "cannon", "mesh_gemm", "collective", "stationary"):
        yield OperationCase(f"matmul, {algorithm}", _with(wk.matmul, algorithm=algorithm), (x, up))
    alone = operands.floats(_T, _D, spec=P("y", "x")), operands.floats(_D, _F, spec=P("y", "x"))
    yield OperationCase(
        "matmul, 2.5d", _with(wk.matmul, algorithm="2.5d"), alone, needs=_has_wafers
    )
    yield OperationCase("matmul, transpose_a", _with(wk.matmul, transpose_a=True), (x, x))
    yield OperationCase("matmul, transpose_b", _with(wk.matmul, transpose_b=True), (x, down))
    yield OperationCase("matmul of a batch", wk.matmul, (batch, up))
    yield OperationCase("matmul of two batches", wk.matmul, (batch, operands.floats(_B, _D, _F)))
    yield OperationCase("matmul of a few rows", wk.matmul, (operands.floats(8, _D), up))
    yield OperationCase("matmul, precision", _with(wk.matmul, precision="highest"), (x, up))

    def fused(a: Any, b: Any, bias: Any) -> jax.Array:
        return wk.matmul(a, b, bias=bias, activation="gelu")

    def scaled(a: Any, b: Any, scales: Any) -> jax.Array:
        return wk.matmul(a, b, scales=scales)

    def several(a: Any, gate: Any, up: Any) -> tuple[jax.Array, ...]:
        return wk.matmul(a, (gate, up), activation="silu")

    yield OperationCase("matmul, bias and activation", fused, (x, up, bias))
    yield OperationCase("matmul, int8 scales", scaled, (x, int8, bias))
    yield OperationCase("matmul of several right factors", several, (x, up, up))

    def of_vectors(x: Any, b: Any, bias: Any) -> jax.Array:
        return wk.gemv(x, b, bias=bias, activation="silu")

    def of_int8(x: Any, b: Any, scales: Any) -> jax.Array:
        return wk.gemv(x, b, scales=scales)

    vectors = operands.floats(_B, _D, spec=P("wafer", "y"))
    across = operands.floats(_B, _D, spec=P("wafer", "x"))
    yield OperationCase("gemv", wk.gemv, (vectors, up))
    yield OperationCase("gemv, transpose_b", _with(wk.gemv, transpose_b=True), (across, down))
    yield OperationCase("gemv, bias and activation", of_vectors, (vectors, up, bias))
    yield OperationCase("gemv, int8 scales", of_int8, (vectors, int8, bias))


def _attention(operands: OperandShapes) -> Iterator[OperationCase]:
    q = operands.floats(_B, _T, _N, _H, spec=_ROWS)
    kv = operands.floats(_B, _T, _K, _H, spec=_ROWS)
    longer = operands.floats(_B, 2 * _T, _K, _H, spec=_ROWS)
    sinks = operands.floats(_N, spec=P("x"))
    bias = operands.floats(_N, _T, _T, spec=P("x", "y", None))
    segments = operands.integers(_B, _T, spec=_TOKENS)
    causal = functools.partial(wk.attention, causal=True)

    def with_sinks(q: Any, k: Any, v: Any, sinks: Any) -> jax.Array:
        return causal(q, k, v, sinks=sinks)

    def with_bias(q: Any, k: Any, v: Any, bias: Any) -> jax.Array:
        return wk.attention(q, k, v, bias=bias)

    def in_segments(q: Any, k: Any, v: Any, ids: Any) -> jax.Array:
        return causal(q, k, v, segment_ids=ids)

    yield OperationCase("attention", wk.attention, (q, kv, kv))
    yield OperationCase("attention, causal", causal, (q, kv, kv))
    for algorithm in ("allgather", "ring"):
        chosen = _with(causal, algorithm=algorithm)
        yield OperationCase(f"attention, causal, {algorithm}", chosen, (q, kv, kv))
    dealt = _with(causal, algorithm="ulysses")
    yield OperationCase("attention, causal, ulysses", dealt, (q, kv, kv), needs=_has_few_pes)
    whole = _with(wk.attention, algorithm="ring")
    yield OperationCase("attention, ring", whole, (q, kv, kv))
    near = _with(causal, window=256, algorithm="ring")
    yield OperationCase("attention, window", _with(causal, window=256), (q, kv, kv))
    yield OperationCase("attention, window, ring", near, (q, kv, kv))
    yield OperationCase("attention, segment_ids", in_segments, (q, kv, kv, segments))
    yield OperationCase("attention, soft_cap", _with(causal, soft_cap=50.0), (q, kv, kv))
    yield OperationCase("attention, sinks", with_sinks, (q, kv, kv, sinks))
    yield OperationCase("attention, bias", with_bias, (q, kv, kv, bias))
    yield OperationCase("attention, more keys", wk.attention, (q, longer, longer))
    yield OperationCase("attention, precision", _with(causal, precision="highest"), (q, kv, kv))


def _decoding(operands: OperandShapes) -> Iterator[OperationCase]:
    sizes: dict[str, Any] = {
        "batch": 8,
        "capacity": 4096,
        "kv_heads": _K,
        "head_size": _H,
        "heads": _N,
    }
    empty = functools.partial(wk.KVCache.empty, **sizes, dtype=operands.dtype)
    cache, sliding = (
        _cache_shapes(empty, operands),
        _cache_shapes(_with(empty, window=512), operands),
    )
    q = operands.floats(8, 1, _N, _H, spec=_NEW)
    new = operands.floats(8, 1, _K, _H, spec=_NEW)
    prompts = operands.floats(8, 512, _K, _H, spec=_ROWS)
    lengths = operands.integers(8, spec=P("wafer"))
    sinks = operands.floats(_N, spec=P("x"))

    def step(q: Any, cache: Any, k: Any, v: Any) -> tuple[jax.Array, wk.KVCache]:
        cache = cache.append(k, v)
        return wk.decode_attention(q, cache), cache

    def with_sinks(q: Any, cache: Any, sinks: Any) -> jax.Array:
        return wk.decode_attention(q, cache, sinks=sinks, soft_cap=50.0)

    def case(name: str, function: Any, *shapes: Any) -> OperationCase:
        return OperationCase(name, function, shapes, has_gradient=False)

    yield case("decode_attention", wk.decode_attention, q, cache)
    yield case("decode_attention, window", wk.decode_attention, q, sliding)
    yield case("decode_attention, sinks and soft_cap", with_sinks, q, cache, sinks)
    yield case("KVCache.empty", empty)
    yield case("KVCache.append", lambda cache, k, v: cache.append(k, v), cache, new, new)
    yield case("KVCache.append, window", lambda cache, k, v: cache.append(k, v), sliding, new, new)
    fill = lambda cache, k, v, lengths: cache.fill(k, v, lengths)  # noqa: E731
    yield case("KVCache.fill", fill, cache, prompts, prompts, lengths)
    yield case("KVCache.append and decode_attention", step, q, cache, new, new)
    yield _paging("KVPages.write and paged_attention", operands, q, new, operands.dtype)
    yield _paging("KVPages.write and paged_attention, int8", operands, q, new, jnp.int8)


def _paging(
    name: str, operands: OperandShapes, q: Any, new: Any, dtype: jax.typing.DTypeLike
) -> OperationCase:
    wafer = operands.wafer
    tokens = 16 * wafer.height  # of a page

    def empty() -> wk.KVPages:
        sizes: dict[str, Any] = {"layers": 2, "pages": 256, "kv_heads": _K, "head_size": _H}
        return wk.KVPages.empty(**sizes, page_tokens=tokens, heads=_N, dtype=dtype)

    with wafer:
        shapes = jax.eval_shape(empty)
    cache = shapes.with_arrays(
        tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=wafer.sharding(spec))
            for leaf, spec in zip(shapes.arrays, (KEYS, VALUES, SCALES, SCALES), strict=False)
        )
    )
    tables = operands.integers(8, 16, spec=P(None, None))
    positions = operands.integers(8, 1, spec=P(None, None))

    def step(q: Any, cache: Any, k: Any, v: Any, tables: Any, positions: Any) -> tuple[Any, Any]:
        cache = cache.write(1, k, v, tables, positions)
        return wk.paged_attention(q, cache, 1, tables, positions, window=512), cache

    whole = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=wafer.sharding(TOKENS)) for x in (q, new)
    ]
    q, new = whole
    shapes_of_step = (q, cache, new, new, tables, positions)
    return OperationCase(name, step, shapes_of_step, has_gradient=False)


def _cache_shapes(empty: Any, operands: OperandShapes) -> wk.KVCache:
    """The shapes of an empty cache, laid out as it lies."""
    with operands.wafer:
        shapes = jax.eval_shape(empty)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=operands.wafer.sharding(SLOTS if len(leaf.shape) == 4 else P()),
        ),
        shapes,
    )


def _experts(operands: OperandShapes) -> Iterator[OperationCase]:
    E, k, T, F = 16, 2, 256, 512
    tiled = P("wafer", "y", "x")
    x = operands.floats(_B, T, _D, spec=tiled)
    chosen = operands.integers(_B, T, k, spec=P("wafer", "y", None))
    shares = operands.floats(_B, T, k, spec=P("wafer", "y", None))
    inner, outer = operands.floats(E, _D, F, spec=tiled), operands.floats(E, F, _D, spec=tiled)
    wide = operands.floats(E, F, spec=P("wafer", "x"))
    narrow = operands.floats(E, _D, spec=P("wafer", "x"))
    weights, biases = (inner, inner, outer), (wide, wide, narrow)
    mixture = _with(wk.experts, activation=_swiglu)
    yield OperationCase("experts", mixture, (x, chosen, shares, weights))
    yield OperationCase("experts, biases", mixture, (x, chosen, shares, weights, biases))
    probabilities = operands.floats(_B, T, E, spec=P("wafer", "y", None))
    yield OperationCase("load_balance_loss", wk.load_balance_loss, (probabilities, chosen))


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def _dense(operands: OperandShapes) -> Iterator[OperationCase]:
    tiled = P("wafer", "y", "x")
    x, row = operands.floats(_B, _T, _D, spec=tiled), operands.floats(_D, spec=P("x"))
    tokens = operands.integers(_B, _T, spec=_TOKENS)
    logits = operands.floats(_B, _T, _V, spec=tiled)
    heads = operands.floats(_B, _T, _N, _H, spec=_ROWS)
    yield OperationCase("rms_norm", wk.rms_norm, (x, row))
    yield OperationCase("rms_norm, features", _with(wk.rms_norm, features=_D - 8), (x, row))
    yield OperationCase("layer_norm", wk.layer_norm, (x, row, row))
    yield OperationCase("layer_norm without bias", wk.layer_norm, (x, row))
    yield OperationCase("cross_entropy", wk.cross_entropy, (logits, tokens))
    yield OperationCase(
        "cross_entropy, vocab", _with(wk.cross_entropy, vocab=_V - 8), (logits, tokens)
    )
    yield OperationCase(
        "embedding", wk.embedding, (tokens, operands.floats(_V, _D, spec=P("x", "y")))
    )
    few = operands.integers(_B, 64, spec=_TOKENS)
    table = operands.floats(_V, _D, spec=P("x", "y"))
    yield OperationCase("embedding of few tokens", wk.embedding, (few, table))
    yield OperationCase("rotary", wk.rotary, (heads,))
    yield OperationCase("rotary, positions", wk.rotary, (heads, tokens))


def _with(function: Any, **options: Any) -> Any:
    return functools.partial(function, **options)
