"""This file is a decoder layer as WaferLLM runs it: one head, keys and values as wide as the model.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025. The vector of a
decoded token lies along one axis, whole on every PE of the other, and each product swaps the two,
so that nothing is ever transposed; ten sums are K-tree all-reductions. Prefill is nine MeshGEMMs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from wsekern import fabric
from wsekern.kernels.matmul import matmul
from wsekern.kernels.norm import rms_norm
from wsekern.wafer import Wafer

ACROSS, DOWN = P("y", "x"), P("x", "y")  # a weight whose rows lie along y, or along x
_WEIGHTS = {
    "query": ACROSS, "key": ACROSS, "value": ACROSS, "out": DOWN, "gate": ACROSS, "up": ACROSS,
    "down": DOWN,
}  # fmt: skip


def shapes(d_model: int, d_ff: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The weights of a layer."""
    wide = dict.fromkeys(("gate", "up"), (d_model, d_ff)) | {"down": (d_ff, d_model)}
    return {
        name: jax.ShapeDtypeStruct(wide.get(name, (d_model, d_model)), dtype) for name in _WEIGHTS
    }


def decode_layer(
    h: jax.Array, weights: dict[str, jax.Array], keys: jax.Array, values: jax.Array, wafer: Wafer
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer of one token `h` [1, D], which joins the cache as its newest entry.

    Args:
      h: laid out along y; D divides by the side of the square grid, as do all sizes.
      weights: of `shapes`.
      keys: the cache, [S, D]; its last entry is replaced.
      values: likewise.
      wafer: where.
    """
    along, cached = P(None, "y"), P("y", "x")
    run = wafer.map(
        _decode, in_specs=(along, _WEIGHTS, cached, cached), out_specs=(along, cached, cached),
        replicated_by_construction=True,
    )  # fmt: skip
    return run(h, weights, keys, values)


def prefill_layer(h: jax.Array, weights: dict[str, jax.Array], wafer: Wafer) -> jax.Array:
    """One layer of the tokens `h` [S, D], each of which attends to all of them."""

    def product(a, b, **options):
        return matmul(a, b, algorithm="mesh", wafer=wafer, **options)

    scale = jnp.ones(h.shape[-1], h.dtype)
    n = rms_norm(h, scale, wafer=wafer)
    q, k, v = (product(n, weights[name]) for name in ("query", "key", "value"))
    scores = product(q, k, transpose_b=True)
    run = wafer.map(_softmax, in_specs=ACROSS, out_specs=ACROSS)
    h = h + product(product(run(scores), v), weights["out"])
    n = rms_norm(h, scale, wafer=wafer)
    gate, up = product(n, weights["gate"]), product(n, weights["up"])
    return h + product(jax.nn.silu(gate) * up, weights["down"])


def _sum(x, along):
    return fabric.all_reduce(x, along, algorithm="k_tree")


def _decode(h, w, keys, values):
    n = _norm(h)
    q, k, v = _products(n, w, "query", "key", "value")
    newest = fabric.axis_index("y") == fabric.axis_size("y") - 1
    last = (keys.shape[0] - 1, 0)
    keys = jnp.where(newest, lax.dynamic_update_slice(keys, _turned(k), last), keys)
    values = jnp.where(newest, lax.dynamic_update_slice(values, v, last), values)
    scores = _sum(jnp.einsum("td,sd->ts", _turned(q), keys), "x")
    weights = jnp.exp(scores - fabric.all_reduce(scores.max(), "y", "max", algorithm="k_tree"))
    o = _sum(weights @ values, "y") / _sum(weights.sum(), "y")
    h = h + _sum(o @ w["out"], "x")
    gate, up = _products(_norm(h), w, "gate", "up")
    return h + _sum((jax.nn.silu(gate) * up) @ w["down"], "x"), keys, values


def _products(n, w, *names):
    """Products of one vector, summed along y at once."""
    parts = jnp.concatenate([n @ w[name] for name in names], 1)
    return jnp.split(_sum(parts, "y"), len(names), 1)


def _norm(h):
    features = h.size * fabric.axis_size("y")
    return h * lax.rsqrt(_sum(jnp.sum(h * h), "y") / features + 1e-5).astype(h.dtype)


def _turned(x):
    """Halves of what a PE holds as pairs, turned by an angle: here the same for all."""
    cos, sin = (f(jnp.ones((), jnp.float32)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    return x * cos + jnp.roll(x, x.shape[1] // 2, 1) * sin


def _softmax(scores):
    weights = jnp.exp(scores - fabric.all_reduce(scores.max(1, keepdims=True), "x", "max"))
    return weights / fabric.all_reduce(weights.sum(1, keepdims=True), "x")
