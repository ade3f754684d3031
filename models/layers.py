"""This file is the blocks that decoders are made of: norms, attention, feed-forward.

Modules hold whole parameters and know no mesh: each names its dimensions in `axes`, which the
sharding table turns into a layout, and computes with operations that use the wafer in force.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from models.rope import frequencies
from models.sparse import SparseFeedForward, gate_with


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("positions", "segment_ids", "bias"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """What attention has to know of the tokens beside their features."""

    positions: Int[Array, "*B T"]  # of each token, `[T]` or `[B, T]`
    segment_ids: Int[Array, "B T"] | None = None  # a token sees those of its own segment
    bias: Float[Array, "B 1 T T"] | None = None  # added to the scores


class Linear(nnx.Module):
    """`x @ weight + bias`; call several that share their input through `together`."""

    def __init__(
        self, config: DecoderConfig, d_in: int, d_out: int, std: float, bias: bool, *, rngs
    ):
        weight = std * jax.random.normal(rngs.params(), (d_in, d_out))
        turned = config.weights == "out_in"
        self.weight = nnx.Param(
            weight.T if turned else weight, axes=("out", "in") if turned else ("in", "out")
        )
        self.bias = nnx.Param(jnp.zeros(d_out), axes=("out",)) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        (out,) = together(x, self)
        return out


def together(x: Float[Array, "B T I"], *linears: Linear) -> tuple[Float[Array, "B T _"], ...]:
    """What each of `linears` makes of `x`, which moves between PEs only once."""
    outs = wk.matmul(x, tuple(in_out(linear.weight).astype(x.dtype) for linear in linears))
    return tuple(
        out if linear.bias is None else out + linear.bias[...].astype(x.dtype)[None, None]
        for out, linear in zip(outs, linears, strict=True)
    )


def in_out(weight: nnx.Param) -> Float[Array, "I O"]:
    """A weight in the order that products take it in, whichever it is kept in."""
    # Turned tile by tile: nothing moves between PEs, and XLA multiplies by the transpose.
    return weight[...] if "in" == weight.axes[-2] else weight[...].T


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the features."""

    def __init__(self, config: DecoderConfig):
        self.kind = config.norm
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_model), axes=("feature",))
        centered = config.norm == "layer" and "norm" in config.biases
        self.bias = nnx.Param(jnp.zeros(config.d_model), axes=("feature",)) if centered else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.kind == "rms":
            return wk.rms_norm(x, self.scale[...], eps=self.eps)
        bias = None if self.bias is None else self.bias[...]
        return wk.layer_norm(x, self.scale[...], bias, eps=self.eps)


class HeadNorm(nnx.Module):
    """RMSNorm of every head by itself, with one scale for all of them: no PE asks another."""

    def __init__(self, config: DecoderConfig):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_head), axes=(None,))

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32)[None, None, None]
        return (wide * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention, grouped queries, rotary positions where the config has them."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.config = config
        self.kind = kind
        std, bias = config.init_std, "qkv" in config.biases
        linear = functools.partial(Linear, config, rngs=rngs)
        self.query = linear(config.d_model, config.d_attention, std, bias)
        self.key = linear(config.d_model, config.d_kv, std, bias)
        self.value = linear(config.d_model, config.d_kv, std, bias)
        self.out = linear(
            config.d_attention, config.d_model, _last(std, config), "out" in config.biases
        )
        self.query_norm = HeadNorm(config) if config.qk_norm else None
        self.key_norm = HeadNorm(config) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(config.heads), axes=("heads",)) if config.sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Sequence,
        recall: Callable[..., Float[Array, "B T N H"]] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention over the sequence, or over what `recall` keeps of it.

        Args:
          x: what came in.
          seen: the sequence.
          recall: what attends instead, a function of this module, queries, keys and values: to a
            cache of keys and values, when text is generated.
        """
        q, k, v = self.projected(x, seen.positions)
        if recall is None:
            o = self.attended(q, k, v, seen)
        else:
            o = recall(self, q, k, v)
        return self.out(o.reshape(*x.shape[:2], self.config.d_attention))

    def projected(self, x, positions) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, normed and turned."""
        config = self.config
        heads = together(x, self.query, self.key, self.value)
        q, k, v = (y.reshape(*x.shape[:2], -1, config.d_head) for y in heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if config.positions == "rotary":
            turns = jnp.asarray(frequencies(config))
            q, k = (wk.rotary(y, positions, frequencies=turns) for y in (q, k))
        return q, k, v

    def attended(self, q, k, v, seen: Sequence) -> Float[Array, "B T N H"]:
        """What the queries make of the keys and values of the same tokens."""
        return wk.attention(
            q,
            k,
            v,
            causal=True,
            window=self.kind.window,
            scale=self.kind.scale,
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            segment_ids=seen.segment_ids,
            bias=seen.bias,
        )


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, or `down(activation(up(x)))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        d_model, d_ff, std = config.d_model, config.d_ff, config.init_std
        linear = functools.partial(Linear, config, bias="mlp" in config.biases, rngs=rngs)
        self.gate = linear(d_model, d_ff, std) if config.gated else None
        self.up = linear(d_model, d_ff, std)
        self.down = linear(d_ff, d_model, _last(std, config))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate is None:
            return self.down(_ACTIVATIONS[self.config.activation](self.up(x)))
        return self.down(gate_with(self.config)(*together(x, self.gate, self.up)))


_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}


def _last(std: float, config: DecoderConfig) -> float:
    # The residual stream adds up 2 x layers such products: GPT-2's scaling keeps its variance.
    return std / (2 * config.layers) ** 0.5


class Block(nnx.Module):
    """One pre-norm layer: attention and feed-forward, each added to what came in."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config)
        self.attention = Attention(config, kind, rngs=rngs)
        self.feed_forward_norm = Norm(config)
        std = _last(config.init_std, config)
        self.feed_forward = (
            SparseFeedForward(config, std, rngs=rngs)
            if kind.sparse
            else FeedForward(config, rngs=rngs)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        seen: Sequence,
        recall: Callable[..., Float[Array, "B T N H"]] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """What comes out, and the layer's load-balance loss (0 without experts)."""
        x = x + self.attention(self.attention_norm(x), seen, recall)
        h = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SparseFeedForward):
            h, balance = self.feed_forward(h)
            return x + h, balance
        return x + self.feed_forward(h), jnp.zeros((), jnp.float32)
