"""The decoder of `models` in plain jnp for `jax.jit` alone: the peer that `train_step` times.

It reads the same parameters, so that both start from one state. On a mesh XLA's partitioner decides
what moves, guided by the layouts that `constrain` gives the activations.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig

Constrain = Callable[[jax.Array, str], jax.Array]

_TILED, _ROWS = P(None, "y", "x"), P(None, "y", None)
# name -> the layout of each kind of activation; XLA chooses the layout of the others
CONSTRAINTS: dict[str, dict[str, P]] = {
    "no constraints": {},
    "residual tiled": {"residual": _TILED},
    "residual on rows": {"residual": _ROWS},
    "residual tiled, gathered for products": {"residual": _TILED, "gathered": _ROWS},
    "all tiled": {
        "residual": _TILED,
        "gathered": _ROWS,
        "wide": _TILED,
        "heads": P(None, "y", "x", None),
    },
    "all tiled, residual on rows": {
        "residual": _ROWS,
        "gathered": _ROWS,
        "wide": _TILED,
        "heads": P(None, "y", "x", None),
    },
}


def loss(
    params: Any,
    tokens: jax.Array,
    targets: jax.Array,
    config: DecoderConfig,
    constrain: Constrain,
    *,
    remat: bool = False,
) -> jax.Array:
    """The mean cross-entropy, in nats a token.

    Args:
      params: the state of a `Decoder` with config `config`, in the dtype to compute in.
      tokens: int `[B, T]`.
      targets: int `[B, T]`, the token after each of `tokens`.
      config: RMSNorm, rotary positions, SwiGLU, one kind of layer.
      constrain: lays out an activation, given its kind: "residual", "gathered", "wide" or "heads",
        and the weights where they compute, of kind "weight".
      remat: whether the backward pass recomputes a layer from its input.
    """

    def whole(w):
        return constrain(w, "weight")

    x = constrain(jnp.take(whole(params["embedding"][...]), tokens, axis=0), "residual")
    angles = rotary_angles(config, tokens.shape[1])

    def layer(x, block):
        return _block(x, jax.tree.map(whole, block), config, angles, constrain), None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    x, _ = jax.lax.scan(layer, x, params["stages"][0]["blocks"][0])
    x = _rms_norm(x, params["norm"]["scale"][...], config.norm_eps)
    head = whole(params["embedding"][...]).T if config.tied else whole(params["head"][...])
    logits = constrain(x, "gathered") @ head
    logits = constrain(logits, "wide").astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _block(x, block, config, angles, constrain):
    attention, feed_forward = block["attention"], block["feed_forward"]
    B, T, _ = x.shape
    h = constrain(_rms_norm(x, block["attention_norm"]["scale"][...], config.norm_eps), "gathered")
    q, k, v = (
        constrain((h @ attention[name]["weight"][...]).reshape(B, T, -1, config.d_head), "heads")
        for name in ("query", "key", "value")
    )
    o = jax.nn.dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
    x = constrain(x + o.reshape(B, T, -1) @ attention["out"]["weight"][...], "residual")
    h = _rms_norm(x, block["feed_forward_norm"]["scale"][...], config.norm_eps)
    h = constrain(h, "gathered")
    gate, up = (constrain(h @ feed_forward[n]["weight"][...], "wide") for n in ("gate", "up"))
    return constrain(x + (jax.nn.silu(gate) * up) @ feed_forward["down"]["weight"][...], "residual")


def _rms_norm(x, scale, eps):
    x32 = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    return (x32 * rstd * scale[None, None]).astype(x.dtype)


def rotary_angles(config: DecoderConfig, T: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[1, T, 1, H / 2]` of the angles for `rotate`."""
    half = config.d_head // 2
    inverse = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(T, dtype=jnp.float32)[None, :, None, None] * inverse[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`x` `[B, T, N, H]` with its features rotated in pairs by `rotary_angles`."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
