"""The layers of a decoder: norms, attention, feed-forward.

A module holds whole parameters and knows no mesh. Each parameter names its dimensions in `axes`,
from which `sharding` makes a layout; the operations of `wsekern` run on the current wafer.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig, LayerKind
from models.quantized import QuantizedWeight, round_rows
from models.rope import frequencies
from models.sparse import SparseFeedForward, gated_activation
from wsekern.kernels.attention.pages import add_halves
from wsekern.wafer import context
from wsekern.wafer.axes import COLS, ROWS, WAFERS

_FEW_TOKENS = 128
_COLUMNS = 8  # of ones: with fewer, a product has another order
_FEATURES = P(WAFERS, ROWS, COLS)  # [B, T, D]
_HEADS = P(WAFERS, ROWS, COLS, None)  # [B, T, N, H]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("positions", "segment_ids", "bias"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    """What attention must know about the tokens besides their features."""

    positions: Int[Array, "*B T"]  # of each token, `[T]` or `[B, T]`
    segment_ids: Int[Array, "B T"] | None = None  # a token sees those of its own segment
    bias: Float[Array, "B 1 T T"] | None = None  # added to the scores


class Linear(nnx.Module):
    """`x @ weight + bias`; several that share their input go through `apply_linears`."""

    def __init__(
        self,
        config: DecoderConfig,
        d_in: int,
        d_out: int,
        std: float,
        bias: bool,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        weight = std * jax.random.normal(rngs.params(), (d_in, d_out))
        transposed = config.weights == "out_in"
        self.weight: nnx.Param | QuantizedWeight = nnx.Param(
            weight.T if transposed else weight, axes=("out", "in") if transposed else ("in", "out")
        )
        self.bias = nnx.Param(jnp.zeros(d_out), axes=("out",)) if bias else None

    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B T O"]:
        (out,) = apply_linears(x, self)
        return out


def apply_linears(x: Float[Array, "B T I"], *linears: Linear) -> tuple[Float[Array, "B T _"], ...]:
    """`linear(x)` for each of `linears`; `x` moves between PEs only once."""
    outs = _products(x, [linear.weight for linear in linears])
    return tuple(
        out if linear.bias is None else out + linear.bias[...].astype(x.dtype)[None, None]
        for out, linear in zip(outs, linears, strict=True)
    )


def _products(
    x: Float[Array, "B T I"], weights: list[nnx.Param | QuantizedWeight]
) -> tuple[Float[Array, "B T _"], ...]:
    rounding = [w for w in weights if isinstance(w, QuantizedWeight) and w.activations]
    if len(rounding) == len(weights):
        rows = round_rows(x, rounding[0].activations)
        return tuple(w.multiply_rounded(rows).astype(x.dtype) for w in rounding)
    factors = [
        w.right_factor(x.dtype)
        if isinstance(w, QuantizedWeight)
        else (in_out_weight(w).astype(x.dtype), None)
        for w in weights
    ]
    matrices, of_scales = zip(*factors, strict=True)
    return wk.matmul(x, matrices, scales=of_scales)


def in_out_weight(weight: nnx.Param) -> Float[Array, "I O"]:
    """A weight as `[in, out]`, in whichever order it is stored."""
    # Transposed tile by tile: nothing moves between PEs, and XLA folds it into the product.
    return weight[...] if "in" == weight.axes[-2] else weight[...].T


def _is_few(x: Float[Array, "B T ..."]) -> bool:
    return x.shape[0] * x.shape[1] <= _FEW_TOKENS


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the features."""

    def __init__(self, config: DecoderConfig) -> None:
        self.kind = config.norm
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_model), axes=("feature",))
        centered = config.norm == "layer" and "norm" in config.biases
        self.bias = nnx.Param(jnp.zeros(config.d_model), axes=("feature",)) if centered else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if _is_few(x) and context.resolve(None) is None:
            return jax.lax.platform_dependent(x, cpu=self._of_few, default=self._of_any)
        return self._of_any(x)

    def _of_any(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.kind == "rms":
            return wk.rms_norm(x, self.scale[...], eps=self.eps)
        bias = None if self.bias is None else self.bias[...]
        return wk.layer_norm(x, self.scale[...], bias, eps=self.eps)

    def _of_few(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The same bits for a token alone as among a few others.

        XLA's CPU backend sums a small array in another order than a large one. A product with
        ones has one order.
        """
        wide, D = x.astype(jnp.float32), x.shape[-1]
        ones = jnp.ones((D, _COLUMNS), jnp.float32)

        def mean(x: Float[Array, "B T D"]) -> Float[Array, "B T 1"]:
            return ((x.reshape(-1, D) @ ones)[:, :1] / D).reshape(*x.shape[:2], 1)

        if self.kind == "layer":
            wide = wide - mean(wide)
        normal = wide * jax.lax.rsqrt(mean(wide * wide) + self.eps)
        out = normal * self.scale[...].astype(jnp.float32)[None, None]
        if self.bias is not None:
            out = out + self.bias[...].astype(jnp.float32)[None, None]
        return out.astype(x.dtype)


class HeadNorm(nnx.Module):
    """RMSNorm of each head by itself, one scale for all heads; nothing moves between PEs."""

    def __init__(self, config: DecoderConfig) -> None:
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(config.d_head), axes=(None,))

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        wide = x.astype(jnp.float32)
        squares = wide * wide
        # Of few tokens, the same bits whatever their number, as in `Norm`.
        total = add_halves(squares) if _is_few(x) else jnp.sum(squares, axis=-1, keepdims=True)
        mean = total / x.shape[-1]
        scale = self.scale[...].astype(jnp.float32)[None, None, None]
        return (wide * jax.lax.rsqrt(mean + self.eps) * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped queries; rotary positions if the config asks for them."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.kind = kind
        std, bias = config.init_std, "qkv" in config.biases
        linear = functools.partial(Linear, config, rngs=rngs)
        self.query = linear(config.d_model, config.d_attention, std, bias)
        self.key = linear(config.d_model, config.d_kv, std, bias)
        self.value = linear(config.d_model, config.d_kv, std, bias)
        self.out = linear(
            config.d_attention, config.d_model, _residual_std(std, config), "out" in config.biases
        )
        self.query_norm = HeadNorm(config) if config.qk_norm else None
        self.key_norm = HeadNorm(config) if config.qk_norm else None
        self.sinks = nnx.Param(jnp.zeros(config.heads), axes=("heads",)) if config.sinks else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        recall: Callable[..., Float[Array, "B T N H"]] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention over the sequence, or over a cache.

        Args:
          x: the features of the tokens.
          sequence: their positions, segments and mask.
          recall: called as `recall(self, q, k, v)` instead of `self.attend`; generation passes a
            function here that attends to its cache of keys and values.
        """
        q, k, v = self.project(x, sequence.positions)
        if recall is None:
            o = self.attend(q, k, v, sequence)
        else:
            o = recall(self, q, k, v)
        return self.out(wk.layout.reshape(o, (*x.shape[:2], self.config.d_attention), _HEADS))

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "*B T"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values; queries and keys normed, and rotated by their positions."""
        config = self.config
        heads = apply_linears(x, self.query, self.key, self.value)
        shape = (*x.shape[:2], -1, config.d_head)
        q, k, v = (wk.layout.reshape(y, shape, _FEATURES) for y in heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if config.positions == "rotary":
            radians = jnp.asarray(frequencies(config))
            q, k = (wk.rotary(y, positions, frequencies=radians) for y in (q, k))
        return q, k, v

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        sequence: Sequence,
    ) -> Float[Array, "B T N H"]:
        """Causal attention of the queries to the keys and values of the same tokens."""
        return wk.attention(
            q,
            k,
            v,
            causal=True,
            window=self.kind.window,
            scale=self.kind.scale,
            sinks=None if self.sinks is None else self.sinks[...].astype(jnp.float32),
            segment_ids=sequence.segment_ids,
            bias=sequence.bias,
        )


class FeedForward(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, or `down(activation(up(x)))`."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        d_model, d_ff, std = config.d_model, config.d_ff, config.init_std
        linear = functools.partial(Linear, config, bias="mlp" in config.biases, rngs=rngs)
        self.gate = linear(d_model, d_ff, std) if config.gated else None
        self.up = linear(d_model, d_ff, std)
        self.down = linear(d_ff, d_model, _residual_std(std, config))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Checkpointed: the backward pass keeps what goes in, and no step to what comes out.
        if self.gate is None:
            activation = jax.checkpoint(_ACTIVATIONS[self.config.activation], prevent_cse=False)
            return self.down(activation(self.up(x)))
        activation = jax.checkpoint(gated_activation(self.config), prevent_cse=False)
        return self.down(activation(*apply_linears(x, self.gate, self.up)))


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "gelu_tanh": functools.partial(nnx.gelu, approximate=True),
    "relu": nnx.relu,
}


def _residual_std(std: float, config: DecoderConfig) -> float:
    # The residual stream is the sum of 2 * layers products; this is GPT-2's scaling, which keeps
    # the variance of the sum independent of depth.
    return std / (2 * config.layers) ** 0.5


class Block(nnx.Module):
    """One pre-norm layer: attention, then feed-forward, each added to its input."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = Norm(config)
        self.attention = Attention(config, kind, rngs=rngs)
        self.feed_forward_norm = Norm(config)
        std = _residual_std(config.init_std, config)
        self.feed_forward = (
            SparseFeedForward(config, std, rngs=rngs)
            if kind.sparse
            else FeedForward(config, rngs=rngs)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        sequence: Sequence,
        recall: Callable[..., Float[Array, "B T N H"]] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The new features, and the layer's load-balance loss (0 without experts)."""
        x = x + self.attention(self.attention_norm(x), sequence, recall)
        h = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, SparseFeedForward):
            h, balance = self.feed_forward(h)
            return x + h, balance
        return x + self.feed_forward(h), jnp.zeros((), jnp.float32)
