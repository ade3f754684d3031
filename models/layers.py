"""This file is the blocks that decoders are made of: norms, attention, feed-forward.

Modules hold whole parameters and know no mesh: each names its dimensions in `axes`, which the
sharding table turns into a layout, and computes with operations that use the wafer in force.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig


class Linear(nnx.Module):
    """`x @ weight + bias`; call several that share their input through `together`."""

    def __init__(self, d_in: int, d_out: int, std: float, bias: bool, *, rngs: nnx.Rngs):
        weight = std * jax.random.normal(rngs.params(), (d_in, d_out))
        self.weight = nnx.Param(weight, axes=("in", "out"))
        self.bias = nnx.Param(jnp.zeros(d_out), axes=("out",)) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        (out,) = together(x, self)
        return out


def together(x: Float[Array, "B T I"], *linears: Linear) -> tuple[Float[Array, "B T _"], ...]:
    """What each of `linears` makes of `x`, which moves between PEs only once."""
    outs = wk.matmul(x, tuple(linear.weight[...].astype(x.dtype) for linear in linears))
    return tuple(
        out if linear.bias is None else out + linear.bias[...].astype(x.dtype)[None, None]
        for out, linear in zip(outs, linears, strict=True)
    )


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the features."""

    def __init__(self, config: DecoderConfig):
        self.kind = config.norm
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_model), axes=("feature",))
        centered = config.norm == "layer" and config.biases
        self.bias = nnx.Param(jnp.zeros(config.d_model), axes=("feature",)) if centered else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.kind == "rms":
            return wk.rms_norm(x, self.scale[...], eps=self.eps)
        bias = None if self.bias is None else self.bias[...]
        return wk.layer_norm(x, self.scale[...], bias, eps=self.eps)


class Attention(nnx.Module):
    """Causal self-attention, grouped queries, rotary positions where the config has them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        d_model, std, bias = config.d_model, config.init_std, config.biases
        self.query = Linear(d_model, config.d_attention, std, bias, rngs=rngs)
        self.key = Linear(d_model, config.d_kv, std, bias, rngs=rngs)
        self.value = Linear(d_model, config.d_kv, std, bias, rngs=rngs)
        self.out = Linear(config.d_attention, d_model, _last(std, config), bias, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, " T"]
    ) -> Float[Array, "B T D"]:
        config = self.config
        B, T, _ = x.shape
        heads = together(x, self.query, self.key, self.value)
        q, k, v = (y.reshape(B, T, -1, config.d_head) for y in heads)
        if config.positions == "rotary":
            q = wk.rotary(q, positions, theta=config.rope_theta)
            k = wk.rotary(k, positions, theta=config.rope_theta)
        o = wk.attention(q, k, v, causal=True)
        return self.out(o.reshape(B, T, config.d_attention))


class FeedForward(nnx.Module):
    """SwiGLU (`down(silu(gate(x)) * up(x))`) or GELU (`down(gelu(up(x)))`, the tanh form)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        d_model, d_ff, std, bias = config.d_model, config.d_ff, config.init_std, config.biases
        gated = config.activation == "swiglu"
        self.gate = Linear(d_model, d_ff, std, bias, rngs=rngs) if gated else None
        self.up = Linear(d_model, d_ff, std, bias, rngs=rngs)
        self.down = Linear(d_ff, d_model, _last(std, config), bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate is None:
            return self.down(nnx.gelu(self.up(x)))
        gate, up = together(x, self.gate, self.up)
        return self.down(nnx.silu(gate) * up)


def _last(std: float, config: DecoderConfig) -> float:
    # The residual stream adds up 2 x layers such products: GPT-2's scaling keeps its variance.
    return std / (2 * config.layers) ** 0.5


class Block(nnx.Module):
    """One pre-norm layer: attention and feed-forward, each added to what came in."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, " T"]
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x), positions)
        return x + self.feed_forward(self.feed_forward_norm(x))
