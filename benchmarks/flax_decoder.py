"""The decoder of `models` on one device in plain Flax nnx: the peer of training in `card`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.plain_decoder import rotary_angles, rotate
from models.config import DecoderConfig


class FlaxDecoder(nnx.Module):
    """RMSNorm, rotary positions, SwiGLU, a tied head; one layer after another, not scanned."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        self.config = config
        init = nnx.initializers.normal(config.init_std)
        self.embedding = nnx.Embed(
            config.vocab, config.d_model, embedding_init=init, dtype=dtype, rngs=rngs
        )
        self.blocks = nnx.List([_Block(config, rngs, dtype) for _ in range(config.layers)])
        self.norm = _norm(config, rngs, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[B, T, V]` of the token that follows each of `tokens`, `[B, T]`."""
        x = self.embedding(tokens)
        angles = rotary_angles(self.config, tokens.shape[1])
        for block in self.blocks:
            x = block(x, angles)
        return self.embedding.attend(self.norm(x))


class _Block(nnx.Module):
    def __init__(self, config, rngs, dtype):
        self.d_head = config.d_head
        init = nnx.initializers.normal(config.init_std)
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=dtype, kernel_init=init, rngs=rngs
        )
        self.attention_norm = _norm(config, rngs, dtype)
        self.query = linear(config.d_model, config.d_attention)
        self.key = linear(config.d_model, config.d_kv)
        self.value = linear(config.d_model, config.d_kv)
        self.out = linear(config.d_attention, config.d_model)
        self.feed_forward_norm = _norm(config, rngs, dtype)
        self.gate = linear(config.d_model, config.d_ff)
        self.up = linear(config.d_model, config.d_ff)
        self.down = linear(config.d_ff, config.d_model)

    def __call__(self, x, angles):
        B, T, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = (f(h).reshape(B, T, -1, self.d_head) for f in (self.query, self.key, self.value))
        cudnn = jax.default_backend() == "gpu" and x.dtype == jnp.bfloat16
        o = jax.nn.dot_product_attention(
            rotate(q, angles),
            rotate(k, angles),
            v,
            is_causal=True,
            implementation="cudnn" if cudnn else None,
        )
        x = x + self.out(o.reshape(B, T, -1))
        h = self.feed_forward_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h))


def _norm(config, rngs, dtype):
    return nnx.RMSNorm(config.d_model, epsilon=config.norm_eps, dtype=dtype, rngs=rngs)
