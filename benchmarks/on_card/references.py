"""Every operation of wsekern in plain jnp, written another way: what a card's results must be.

They run on the host in float32. None is fast, and none keeps memory low.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    segment_ids: jax.Array | None = None,
    first: int = 0,
) -> jax.Array:
    """Attention with all scores at once; what is not seen has weight 0, not score -inf.

    Args:
      q: queries, `[B, T, N, H]`.
      k: keys, `[B, S, K, H]`.
      v: values, likewise.
      bias: added to the scores, `[B, N, T, S]`.
      sinks: one score of each head in the denominator only.
      causal: query t sees keys 0 to `first + t`.
      window: how many of them, the last ones.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`.
      segment_ids: `[B, T]`; a query sees keys of its own segment.
      first: place of the first query among the keys.
    """
    (_, T, N, H), S = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, N // x.shape[2], 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    if soft_cap:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    behind = first + jnp.arange(T)[:, None] - jnp.arange(S)[None]
    seen = (behind >= 0)[None, None] if causal else jnp.ones((1, 1, T, S), bool)
    if window:
        seen = seen & (behind < window)[None, None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    top = jax.lax.stop_gradient(jnp.abs(scores).max())
    weights = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.reshape(1, N, 1, 1) - top)
    return jnp.einsum("bnts,bsnh->btnh", weights / total, v)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`x` over the root of its mean square, times `scale`."""
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale[None, None]


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float = 1e-5) -> jax.Array:
    """`x` less its mean over its deviation, times `scale`, plus `bias`."""
    deviation = jnp.sqrt(x.var(-1, keepdims=True) + eps)
    return (x - x.mean(-1, keepdims=True)) / deviation * scale[None, None] + bias[None, None]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of each token, in nats."""
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -(jax.nn.log_softmax(logits) * chosen).sum(-1)


def rotary(x: jax.Array, theta: float = 10_000.0) -> jax.Array:
    """Pairs of features as complex numbers, times a turn."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)[None]
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angles)[None, :, None]
    return jnp.concatenate([turned.real, turned.imag], -1)


def experts(
    x: jax.Array,
    chosen: jax.Array,
    shares: jax.Array,
    weights: Sequence[jax.Array],
    activation: Callable,
) -> jax.Array:
    """Every expert on every token, the chosen ones summed."""
    gate, up, down = weights
    hidden = activation(*(jnp.einsum("btd,edf->btef", x, w) for w in (gate, up)))
    y = jnp.einsum("btef,efd->bted", hidden, down)
    share = (jax.nn.one_hot(chosen, len(gate)) * shares[..., None]).sum(2)
    return (y * share[..., None]).sum(2)


def load_balance_loss(probabilities: jax.Array, chosen: jax.Array) -> jax.Array:
    """E times the sum over experts of their share of the tokens and their mean probability."""
    E, k = probabilities.shape[-1], chosen.shape[-1]
    used = jnp.bincount(chosen.reshape(-1), length=E) / (chosen.size / k)
    return E * (used * probabilities.reshape(-1, E).mean(0)).sum()


def steps(
    fields: Any,
    update: Callable,
    count: int,
    radius: int,
    boundary: str = "constant",
    coefficients: Any = None,
    after: Callable[[Any, jax.Array], Any] = lambda fields, step: fields,
) -> Any:
    """`count` steps of a stencil by padding whole arrays.

    Args:
      fields: a field or a dict of fields.
      update: one step, from padded arrays.
      count: how many.
      radius: cells to pad by, along every dimension.
      boundary: a mode of `jnp.pad`.
      coefficients: a field that `update` reads too; its last cells repeat.
      after: what is done to the fields after each step.
    """
    around = () if coefficients is None else (jnp.pad(coefficients, radius, mode="edge"),)

    def step(fields: Any, number: jax.Array) -> tuple[Any, None]:
        padded = jax.tree.map(lambda f: jnp.pad(f, radius, mode=boundary), fields)
        return after(update(padded, *around), number), None

    return jax.lax.scan(step, fields, jnp.arange(count))[0]
