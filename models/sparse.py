"""The sparse feed-forward layer: a router chooses a few experts for each token.

N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", 2017; W. Fedus, B. Zoph and N. Shazeer, "Switch Transformers", 2021 (the loss that keeps the
use of experts even).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import wsekern as wk
from models.config import DecoderConfig, ExpertsConfig
from models.quantized import QuantizedWeight
from wsekern.wafer.axes import ROWS, WAFERS


class SparseFeedForward(nnx.Module):
    """The outputs of a token's chosen experts, summed with the router's weights."""

    def __init__(self, config: DecoderConfig, std_last: float, *, rngs: nnx.Rngs) -> None:
        experts = config.experts
        if experts is None:
            raise ValueError("a sparse layer needs experts=ExpertsConfig(..)")
        self.config, self.experts = config, experts
        d_model, std, count, d_ff = config.d_model, config.init_std, experts.count, experts.d_ff

        def weight(scale: float, *shape: int, axes: tuple[str | None, ...]) -> Any:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape), axes=axes)

        def bias(d_out: int) -> nnx.Param | None:
            return nnx.Param(jnp.zeros((count, d_out)), axes=_BIAS) if experts.biases else None

        # Split along the features alone: it is small, and so are the scores, which every PE needs.
        self.router = weight(std, d_model, count, axes=("feature", None))
        self.router_bias = nnx.Param(jnp.zeros(count), axes=(None,)) if experts.biases else None
        self.gate = weight(std, count, d_model, d_ff, axes=_WEIGHT)
        self.up = weight(std, count, d_model, d_ff, axes=_WEIGHT)
        self.down = weight(std_last, count, d_ff, d_model, axes=_WEIGHT)
        self.gate_bias, self.up_bias, self.down_bias = bias(d_ff), bias(d_ff), bias(d_model)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The new features, and the load-balance loss before `experts.balance` scales it."""
        scores = jnp.einsum(
            "btd,de->bte", x, self.router[...].astype(x.dtype), preferred_element_type=jnp.float32
        )
        if self.router_bias is not None:
            scores = scores + self.router_bias[...][None, None]
        chosen, shares = wk.layout.tilewise(
            functools.partial(choose_experts, experts=self.experts),
            scores,
            in_specs=(_SCORES,),
            out_specs=_SCORES,
        )
        weights = (self.gate, self.up, self.down)
        biases = tuple(
            bias[...].astype(x.dtype)
            for bias in (self.gate_bias, self.up_bias, self.down_bias)
            if bias is not None
        )
        out = wk.experts(
            x,
            chosen,
            shares.astype(x.dtype),
            tuple(_whole(weight, x.dtype) for weight in weights),
            biases or None,
            activation=gated_activation(self.config),
        )
        return out, wk.load_balance_loss(jax.nn.softmax(scores), chosen)


def _whole(weight: nnx.Param | QuantizedWeight, dtype: jnp.dtype) -> Float[Array, "E I O"]:
    if isinstance(weight, QuantizedWeight):
        return weight.dequantize(dtype)
    return weight[...].astype(dtype)


_WEIGHT = ("expert", "in", "out")
_BIAS = ("expert", "out")
_SCORES = P(WAFERS, ROWS)  # of every expert, whole in each column of PEs


def choose_experts(
    scores: Float[Array, "B T E"], experts: ExpertsConfig
) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
    """The experts of each token, and the weight of each in the sum."""
    if experts.router == "top_softmax":
        top, chosen = jax.lax.top_k(scores, experts.chosen)
        return chosen, jax.nn.softmax(top)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores), experts.chosen)
    if experts.normalized:
        shares = shares / shares.sum(-1, keepdims=True)
    return chosen, shares


def gated_activation(config: DecoderConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The function of a gated feed-forward's two products, gate and up."""
    if config.activation == "clamped_swiglu":
        return functools.partial(
            _clamped_swiglu, alpha=config.swiglu_alpha, limit=config.swiglu_limit
        )
    return _swiglu


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nnx.silu(gate) * up


def _clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
