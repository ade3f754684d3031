"""Norms, loss, embedding, rotary positions and experts in plain jnp: peers under `jax.jit` alone.

Results are laid out as those of `wsekern`, so that XLA's partitioner has the same to do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from benchmarks import plain_decoder

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_TILED, _ROWS, _HEADS = P(None, "y", "x"), P(None, "y"), P(None, "y", "x", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCase:
    """An operation with its peer, and operands for both."""

    name: str
    title: str
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    operands: tuple[jax.ShapeDtypeStruct, ...]
    differentiable: tuple[int, ...]  # numbers of the operands that have a gradient
    spec: P  # the layout of the result

    def result(self, wafer: Wafer) -> jax.ShapeDtypeStruct:
        """Shape, dtype and layout of the result, and so of its gradient."""
        shape = jax.eval_shape(self.plain, *self.operands)
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=wafer.sharding(self.spec))


def cases(
    wafer: Wafer, *, batch: int, tokens: int, features: int, vocabulary: int
) -> Iterator[LayerCase]:
    """The operations in bfloat16.

    Args:
      wafer: where the operands lie.
      batch: sequences.
      tokens: in each of them.
      features: of a token.
      vocabulary: words of the table and of the logits.
    """

    def of(shape: tuple[int, ...], spec: P, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=wafer.sharding(spec))

    x, vector = of((batch, tokens, features), _TILED), of((features,), P("x"))
    words = of((batch, tokens), _ROWS, jnp.int32)
    logits = of((batch, tokens, vocabulary), _TILED)
    table = of((vocabulary, features), P("x", "y"))
    heads = of((batch, tokens, features // 128, 128), _HEADS)
    weight, (count, chosen, hidden) = P(None, "y", "x"), (32, 4, features // 4)
    gate, down = of((count, features, hidden), weight), of((count, hidden, features), weight)
    choices, shares = (of((batch, tokens, chosen), _ROWS, d) for d in (jnp.int32, jnp.bfloat16))
    several = f"experts, {chosen} of {count}"
    table_of_cases = (
        ("rms_norm", "RMSNorm", _rms_norm, wk.rms_norm, _TILED, (x, vector), (0, 1)),
        (
            "layer_norm", "LayerNorm", _layer_norm, wk.layer_norm, _TILED, (x, vector, vector),
            (0, 1, 2),
        ),
        (
            "cross_entropy", "cross-entropy", _cross_entropy, wk.cross_entropy, _ROWS,
            (logits, words), (0,),
        ),
        ("embedding", "embedding", _embedding, wk.embedding, _TILED, (words, table), (1,)),
        ("rotary", "rotary positions", _rotary, wk.rotary, _HEADS, (heads,), (0,)),
        (
            "experts", several, _ragged_dot_experts, _experts, _TILED,
            (x, choices, shares, gate, gate, down), (0, 2, 3, 4, 5),
        ),
    )  # fmt: skip
    for name, title, plain, ours, spec, operands, differentiable in table_of_cases:
        yield LayerCase(
            name=name,
            title=title,
            plain=functools.partial(_laid_out, plain, wafer, spec),
            ours=ours,
            operands=operands,
            differentiable=differentiable,
            spec=spec,
        )


def _experts(x: jax.Array, choices: jax.Array, shares: jax.Array, *weights: jax.Array) -> jax.Array:
    return wk.experts(x, choices, shares, weights, activation=_swiglu)


def _laid_out(function: Callable[..., Any], wafer: Wafer, spec: P, *operands: Any) -> Any:
    return wafer.shard(function(*operands), spec)


def _rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (wide * rstd * scale[None, None]).astype(x.dtype)


def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    y = jax.nn.standardize(x.astype(jnp.float32), epsilon=1e-5)
    return (y * scale[None, None] + bias[None, None]).astype(x.dtype)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    wide = logits.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(wide, labels)


def _embedding(tokens: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.take(table, tokens, axis=0)


def _rotary(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    inverse = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = positions[None, :, None, None] * inverse[None, None, None]
    return plain_decoder.rotate(x, (jnp.cos(angles), jnp.sin(angles)))


def _ragged_dot_experts(
    x: jax.Array, choices: jax.Array, shares: jax.Array, *weights: jax.Array
) -> jax.Array:
    (gate, up, down), k = weights, choices.shape[-1]
    order = jnp.argsort(choices.reshape(-1), stable=True)
    rows = x.reshape(-1, x.shape[-1])[order // k]
    counts = jnp.bincount(choices.reshape(-1), length=len(gate))
    hidden = _swiglu(*(jax.lax.ragged_dot(rows, w, counts) for w in (gate, up)))
    out = jax.lax.ragged_dot(hidden, down, counts)[jnp.argsort(order)]
    return (out.reshape(*choices.shape, -1) * shares[..., None]).sum(2)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up
