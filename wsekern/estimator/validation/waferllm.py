"""A decoder layer as WaferLLM runs it, extended to grouped queries.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025. The vector of a
decoded token is split along one axis and whole along the other. Each product swaps the two axes, so
that nothing is ever transposed; ten sums are K-tree all-reductions. Prefill is nine MeshGEMMs.
The paper's layer has one head, with keys and values as wide as the model. Where they are narrower,
`G` groups of queries, each as wide as the keys, share them; all heads of a group are summed as one.

Sizes: B sequences, S cached tokens, D features of a token, Dkv of its keys, V words; ends in t on
one PE, as Dt.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.dense.norm import rms_norm
from wsekern.kernels.matmul.matmul import matmul
from wsekern.wafer.wafer import Wafer

ACROSS, DOWN = P("y", "x"), P("x", "y")  # a weight whose rows lie along y, or along x
_DOWN = ("out", "down")  # weights that meet a vector along x, and return it along y
_Weights = dict[str, jax.Array]


def shapes(
    d_model: int,
    d_ff: int,
    dtype: Any,
    *,
    d_query: int | None = None,
    d_kv: int | None = None,
    gated: bool = True,
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a layer's weights, by name.

    Args:
      d_model: features of a token.
      d_ff: features of the feed-forward part.
      dtype: dtype of the weights.
      d_query: features of all queries of a token, a multiple of `d_kv`; by default `d_model`.
      d_kv: features of all keys of a token; by default `d_query`.
      gated: whether the feed-forward part multiplies two products.
    """
    d_query = d_model if d_query is None else d_query
    d_kv = d_query if d_kv is None else d_kv
    sizes = {"query": (d_model, d_query), "key": (d_model, d_kv), "value": (d_model, d_kv)}
    sizes |= {"out": (d_query, d_model)}
    sizes |= {"gate": (d_model, d_ff)} if gated else {}
    sizes |= {"up": (d_model, d_ff), "down": (d_ff, d_model)}
    return {name: jax.ShapeDtypeStruct(size, dtype) for name, size in sizes.items()}


def decode_layer(
    h: Float[Array, "B D"],
    weights: _Weights,
    keys: Float[Array, "B S Dkv"],
    values: Float[Array, "B S Dkv"],
    wafer: Wafer,
) -> tuple[Float[Array, "B D"], Float[Array, "B S Dkv"], Float[Array, "B S Dkv"]]:
    """One layer for one new token of each sequence: its features, and the caches with it.

    Args:
      h: the features of the tokens, laid out along y. All sizes but B divide by the side of the
        grid.
      weights: by the names of `shapes`.
      keys: the cache; the token's keys replace its last entry.
      values: the cache; the token's values replace its last entry.
      wafer: a square grid.
    """
    along, cached = P(None, "y"), P(None, "y", "x")
    specs = {name: DOWN if name in _DOWN else ACROSS for name in weights}
    run = wafer.map(
        _decode, in_specs=(along, specs, cached, cached), out_specs=(along, cached, cached),
        replicated_by_construction=True,
    )  # fmt: skip
    return run(h, weights, keys, values)


def prefill_layer(
    h: Float[Array, "S D"], weights: dict[str, Any], wafer: Wafer
) -> Float[Array, "S D"]:
    """One layer for the tokens of a prompt, each of which attends to all.

    Args:
      h: the features of the tokens, laid out over the grid.
      weights: by the names of `shapes`; where queries are wider than keys, "query" and "out" are
        tuples with the weights of each group.
      wafer: a square grid.
    """

    def product(
        a: Float[Array, "..."], b: Float[Array, "..."], transpose_b: bool = False
    ) -> Float[Array, "..."]:
        return matmul(a, b, algorithm="mesh_gemm", transpose_b=transpose_b, wafer=wafer)

    scale = jnp.ones(h.shape[-1], h.dtype)
    run = wafer.map(_softmax, in_specs=ACROSS, out_specs=ACROSS)
    n = rms_norm(h, scale, wafer=wafer)
    k, v = product(n, weights["key"]), product(n, weights["value"])
    for query, out in zip(*(_groups(weights[name]) for name in ("query", "out")), strict=True):
        scores = product(product(n, query), k, transpose_b=True)
        h = h + product(product(run(scores), v), out)
    n = rms_norm(h, scale, wafer=wafer)
    up = product(n, weights["up"])
    if "gate" in weights:
        return h + product(jax.nn.silu(product(n, weights["gate"])) * up, weights["down"])
    return h + product(jax.nn.gelu(up), weights["down"])


def head(h: Float[Array, "B D"], weight: Float[Array, "D V"], wafer: Wafer) -> Float[Array, "B V"]:
    """Logits of the tokens, laid out along x.

    Args:
      h: the features of the tokens, laid out along y as for `decode_layer`.
      weight: of the head, its rows along y.
      wafer: a square grid.
    """
    run = wafer.map(
        lambda h, w: _sum(_norm(h) @ w, "y"), in_specs=(P(None, "y"), ACROSS),
        out_specs=P(None, "x"), replicated_by_construction=True,
    )  # fmt: skip
    return run(h, weight)


def vector_products(
    x: Float[Array, "B D"], weight: Float[Array, "D V"], repeats: int, wafer: Wafer
) -> Float[Array, "B V"]:
    """`x @ weight` by MeshGEMV, again and again: a product on every PE, and a sum by K-tree.

    The published benchmark times a hundred such products in a row. A PE begins the next one when it
    has the sum of the last.

    Args:
      x: vectors, laid out along y.
      weight: its rows along y.
      repeats: how many products.
      wafer: a square grid.
    """

    def per_pe(x: Float[Array, "B Dt"], w: Float[Array, "Dt Vt"]) -> Float[Array, "B Vt"]:
        def once(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            x, _ = lax.optimization_barrier(carry)
            return (x, _sum(x @ w, "y")), None

        first = (x, jnp.zeros((x.shape[0], w.shape[1]), x.dtype))
        return lax.scan(once, first, length=repeats)[0][1]

    run = wafer.map(
        per_pe, in_specs=(P(None, "y"), ACROSS), out_specs=P(None, "x"),
        replicated_by_construction=True,
    )  # fmt: skip
    return run(x, weight)


def _groups(weight: Any) -> tuple[Any, ...]:
    return weight if isinstance(weight, tuple) else (weight,)


def _sum(x: Float[Array, "..."], along: str) -> Float[Array, "..."]:
    return fabric.all_reduce(x, along, algorithm="k_tree")


def _decode(
    h: Float[Array, "B Dt"],
    w: _Weights,
    keys: Float[Array, "B St Dkvt"],
    values: Float[Array, "B St Dkvt"],
) -> tuple[Float[Array, "B Dt"], Float[Array, "B St Dkvt"], Float[Array, "B St Dkvt"]]:
    n, B = _norm(h), len(h)
    q, k, v = _products(n, w, "query", "key", "value")
    q = q.reshape(B, -1, k.shape[-1])
    # The cache's tokens lie along y: its last entry is on the last row of PEs.
    newest = fabric.axis_index("y") == fabric.axis_size("y") - 1
    last = (0, keys.shape[1] - 1, 0)
    keys = jnp.where(newest, lax.dynamic_update_slice(keys, _rotate(k)[:, None], last), keys)
    values = jnp.where(newest, lax.dynamic_update_slice(values, v[:, None], last), values)
    # Softmax over all cached tokens: each PE exponentiates its own against the largest of all, and
    # divides once, after the weighted sum.
    scores = _sum(jnp.einsum("bgd,bsd->bgs", _rotate(q), keys), "x")
    most = fabric.all_reduce(scores.max(-1, keepdims=True), "y", "max", algorithm="k_tree")
    weights = jnp.exp(scores - most)
    o = _sum(jnp.einsum("bgs,bsd->bgd", weights, values), "y")
    o = o / _sum(weights.sum(-1, keepdims=True), "y")
    h = h + _sum(o.reshape(B, -1) @ w["out"], "x")
    n = _norm(h)
    if "gate" in w:
        gate, up = _products(n, w, "gate", "up")
        return h + _sum((jax.nn.silu(gate) * up) @ w["down"], "x"), keys, values
    (up,) = _products(n, w, "up")
    return h + _sum(jax.nn.gelu(up) @ w["down"], "x"), keys, values


def _products(n: Float[Array, "B Dt"], w: _Weights, *names: str) -> list[Float[Array, "B ..."]]:
    """The product of `n` with each named weight; one message sums all of them along y."""
    parts = [n @ w[name] for name in names]
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + part.shape[1])
    whole = _sum(jnp.concatenate(parts, 1), "y")
    return [whole[:, a:b] for a, b in zip(ends, ends[1:], strict=False)]


def _norm(h: Float[Array, "B Dt"]) -> Float[Array, "B Dt"]:
    features = h.shape[1] * fabric.axis_size("y")
    squares = _sum(jnp.sum(h * h, 1, keepdims=True), "y")
    return h * lax.rsqrt(squares / features + 1e-5).astype(h.dtype)


def _rotate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rotary positions at the usual cost, by one angle for all pairs of features.

    Pairs are the halves of a PE's features: that needs no move, and the times do not depend on the
    angle.
    """
    cos, sin = (f(jnp.ones((), jnp.float32)).astype(x.dtype) for f in (jnp.cos, jnp.sin))
    return x * cos + jnp.roll(x, x.shape[-1] // 2, -1) * sin


def _softmax(scores: Float[Array, "St Tt"]) -> Float[Array, "St Tt"]:
    most = fabric.all_reduce(lax.stop_gradient(scores.max(1, keepdims=True)), "x", "max")
    weights = jnp.exp(scores - most)
    return weights / fabric.all_reduce(weights.sum(1, keepdims=True), "x")
