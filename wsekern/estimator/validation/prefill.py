"""WaferLLM's prefill of one layer, step by step as its published program runs it.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025, and the program
for the WSE-2 that is published with it. A product is MeshGEMM: both factors turn round folded
rings, in as many trips as the grid has rows. Three things cost what a product of the library does
not:

    vectors    lie along the tokens of a tile, however few these are. `validation.programs` says so
               to the estimator.
    alignment  The left factor is aligned in P / 2 trips, each of one move of two hops. Keys, values
               and the gate take the factor as it was aligned for queries and for `up`.
    weights    are aligned by the host, before they are loaded.

Sizes: S tokens, D features of a token, F of the feed-forward part; ends in t on one PE, as Dt.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.dense.norm import rms_norm
from wsekern.kernels.matmul import tile
from wsekern.kernels.matmul.cannon import Cannon
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer

_TILED = P(ROWS, COLS)
_ATTENTION, _FEED_FORWARD = ("query", "key", "value", "out"), ("gate", "up", "down")


def align_weights(weights: dict[str, Array], wafer: Wafer) -> dict[str, Array]:
    """The weights as the first trip of a product needs them, which the host arranges.

    Args:
      weights: by the names of `waferllm.shapes`.
      wafer: a square grid.
    """
    run = wafer.map(_aligned_at_once, in_specs=_TILED, out_specs=_TILED)
    return {name: run(weight) for name, weight in weights.items()}


def layer(h: Float[Array, "S D"], weights: dict[str, Array], wafer: Wafer) -> Float[Array, "S D"]:
    """One layer with one head for the tokens of a prompt, each of which attends to all.

    Args:
      h: the features of the tokens, laid out over the grid. All sizes divide by its side.
      weights: by the names of `waferllm.shapes`, as `align_weights` returns them.
      wafer: a square grid.
    """
    scale = jnp.ones(h.shape[-1], h.dtype)
    for kernel, names in ((_attend, _ATTENTION), (_feed_forward, _FEED_FORWARD)):
        run = wafer.map(kernel, in_specs=(_TILED, _TILED, _TILED), out_specs=_TILED)
        h = run(h, rms_norm(h, scale, wafer=wafer), {name: weights[name] for name in names})
    return h


def product(a: Float[Array, "M K"], b: Float[Array, "K N"], wafer: Wafer) -> Float[Array, "M N"]:
    """`a @ b` by MeshGEMM as it is published by itself: one alignment, and as many trips as rows.

    Args:
      a: laid out over the grid.
      b: as `align_weights` lays it out.
      wafer: a square grid; all sizes divide by its side.
    """
    run = wafer.map(
        lambda a, b: _product(_aligned(a), b), in_specs=(_TILED, _TILED), out_specs=_TILED
    )
    return run(a, b)


def _attend(
    h: Float[Array, "St Dt"], n: Float[Array, "St Dt"], w: dict[str, Array]
) -> Float[Array, "St Dt"]:
    n = _aligned(n)
    q, k, v = (_product(n, w[name]) for name in ("query", "key", "value"))
    result = tile.TileResult((q.shape[0], k.shape[0]))
    scores = Cannon(ring="folded").nt(q, k, result).astype(h.dtype)
    most = fabric.all_reduce(scores.max(1, keepdims=True), COLS, "max")
    shares = jnp.exp(scores - most)
    shares = shares / fabric.all_reduce(shares.sum(1, keepdims=True), COLS)
    attended = _product(_aligned(shares), _aligned_at_once(v))
    return h + _product(_aligned(attended), w["out"])


def _feed_forward(
    h: Float[Array, "St Dt"], n: Float[Array, "St Dt"], w: dict[str, Array]
) -> Float[Array, "St Dt"]:
    n = _aligned(n)
    up, gate = _product(n, w["up"]), _product(n, w["gate"])
    return h + _product(_aligned(jax.nn.silu(gate) * up), w["down"])


def _product(x: Float[Array, "Mt Kt"], y: Float[Array, "Kt Nt"]) -> Float[Array, "Mt Nt"]:
    """The product of aligned factors; `x` is as it was once it has gone all the way round."""
    result = tile.TileResult((x.shape[0], y.shape[1]))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        x, y, total = carry
        total = total + tile.product("nn", x, y, result)
        return (_next_of_ring(x, COLS), _next_of_ring(y, ROWS), total), None

    carry = (x, y, tile.zeros(result.shape, x, y))
    return lax.scan(step, carry, length=fabric.axis_size(COLS))[0][2].astype(x.dtype)


def _aligned(x: Float[Array, "Mt Kt"]) -> Float[Array, "Mt Kt"]:
    """`x` turned by each row's place in the ring, one place a trip, the shorter way round."""
    size = fabric.axis_size(ROWS)
    place = fabric.ring_index(ROWS, "folded")
    forward = jnp.where(place <= size // 2, place, 0)
    backward = jnp.where(place <= size // 2, 0, size - place)

    def step(x: Array, trip: Array) -> tuple[Array, None]:
        x = jnp.where(trip < forward, _next_of_ring(x, COLS), x)
        return jnp.where(trip < backward, fabric.shift(x, COLS, 1, ring="folded"), x), None

    return lax.scan(step, x, jnp.arange(size // 2))[0]


def _aligned_at_once(y: Float[Array, "Kt Nt"]) -> Float[Array, "Kt Nt"]:
    return fabric.skew(y, ROWS, COLS, times=-1, ring="folded")


def _next_of_ring(x: Float[Array, "..."], along: str) -> Float[Array, "..."]:
    return fabric.shift(x, along, -1, ring="folded")
