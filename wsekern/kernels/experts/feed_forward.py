"""Each expert's gated feed-forward on the rows of tokens that chose it, and its gradients.

Public per-PE functions. Rows are sorted by expert. Weights are split over the PEs by inputs and
outputs, so a PE gathers the inputs along y, and the hidden layer along x between the products.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.experts import grouped_matmul
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS

Weights = tuple[Float[Array, "E _ _"], ...]  # gate and up [E, D, F], down [E, F, D]
Biases = tuple[Float[Array, "E _"], ...]  # of gate and up [E, F], of down [E, D]; () for none
Rows = Float[Array, "R _"]  # a row for each choice of a token, sorted by expert
Activation = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsPlan:
    """What is known before anything is traced."""

    activation: Activation
    precision: lax.PrecisionLike
    D: int  # features of a token, without padding
    F: int  # features of the hidden layer, without padding
    weights_stay: bool = False  # where they lie, and what moves are the few tokens


class Exchange(NamedTuple):
    """How a PE exchanges tiles with others; one device has no others."""

    gather: Callable[[jax.Array, str, int], jax.Array]
    scatter: Callable[[jax.Array, str, int], jax.Array]
    pes: Callable[[str], int]


FABRIC = Exchange(fabric.all_gather, fabric.reduce_scatter, fabric.axis_size)
ALONE = Exchange(lambda x, axis, d: x, lambda x, axis, d: x, lambda axis: 1)


class Tokens(NamedTuple):
    """Tokens as R rows, a row for each choice, sorted by expert."""

    rows: Float[Array, "R D"]
    shares: Float[Array, "R 1"]
    groups: grouped_matmul.Groups
    choices: int

    def sum_choices(self, rows: Rows) -> Float[Array, "n _"]:
        """For each token the sum of its rows."""
        return rows[self.groups.place].reshape(-1, self.choices, rows.shape[1]).sum(1)


def sort_tokens(
    x: Float[Array, "n D"], chosen: Int[Array, "*n k"], shares: Float[Array, "*n k"], count: int
) -> Tokens:
    """Tokens as rows sorted by their expert; numbers outside 0 to `count` - 1 are no expert.

    A row without an expert has share 0: its result is 0, and 0 times a NaN would be NaN.
    """
    k = chosen.shape[-1]
    chosen = jnp.where(chosen < 0, count, chosen)  # `count` and above: no expert
    groups = grouped_matmul.sort_by_group(chosen.reshape(-1), count)
    sorted_shares = jnp.where(groups.has_group(), shares.reshape(-1)[groups.order], 0)
    return Tokens(x[groups.order // k], sorted_shares[:, None], groups, k)


def forward(
    tokens: Tokens, weights: Weights, biases: Biases, plan: ExpertsPlan, exchange: Exchange
) -> tuple[Rows, tuple[Rows, ...]]:
    """The experts' results, not yet multiplied by shares, and gate's and up's products."""
    gate, up, down = _gather_weights(weights, plan, exchange)
    groups = tokens.groups
    product = functools.partial(grouped_matmul.product, groups=groups, precision=plan.precision)
    products = product(tokens.rows, (gate, up))
    if biases:
        pairs = zip(products, biases[:2], strict=True)
        products = tuple(p + _bias_of_rows(b, groups) for p, b in pairs)
    hidden = _gather_hidden(plan.activation(*products), plan, exchange)
    (y,) = product(hidden, (down,))
    if biases:
        y = y + _bias_of_rows(biases[2], groups)
    return y, products


def forward_in_place(
    tokens: Tokens, weights: Weights, biases: Biases, plan: ExpertsPlan
) -> Float[Array, "R Dx"]:
    """This PE's part of the experts' results, in float32, to be summed along y; no weight moves.

    Each PE multiplies its own inputs of the rows, which it has whole. What is summed along y, and
    gathered along x, are features of the hidden layer. So it serves few rows.
    """
    groups, dtype = tokens.groups, tokens.rows.dtype
    product = functools.partial(
        grouped_matmul.product, groups=groups, precision=plan.precision, dtype=jnp.float32
    )
    products = product(_own_inputs(tokens.rows, weights[0]), weights[:2])
    products = fabric.all_reduce(jnp.stack(products), ROWS)
    if biases:
        products = products + jnp.stack([_bias_of_rows(b, groups) for b in biases[:2]])
    hidden = plan.activation(*products.astype(dtype))
    hidden = _gather_hidden(hidden, plan, FABRIC)
    (y,) = product(_own_inputs(hidden, weights[2]), weights[2:])
    if biases:
        y = y + jnp.where(fabric.axis_index(ROWS) == 0, _bias_of_rows(biases[2], groups), 0)
    return y


def _own_inputs(rows: Float[Array, "R K"], weight: Float[Array, "E Ky _"]) -> Rows:
    """The features of rows that this PE's weights multiply."""
    count = weight.shape[1]
    padded = layout.resize(rows, 1, count * fabric.axis_size(ROWS))
    return lax.dynamic_slice_in_dim(padded, fabric.axis_index(ROWS) * count, count, 1)


def backward(
    tokens: Tokens,
    dy: Rows,
    weights: Weights,
    biases: Biases,
    products: tuple[Rows, ...],
    plan: ExpertsPlan,
    exchange: Exchange,
) -> tuple[Rows, Float[Array, " R"], Weights, Biases]:
    """Gradients of rows and shares (both still to be summed along x), of weights and of biases.

    `dy` is the gradient of the result in the sorted rows, not yet multiplied by shares.
    """
    rows, shares, groups, _ = tokens
    gate, up, down = _gather_weights(weights, plan, exchange)
    product = functools.partial(
        grouped_matmul.product, groups=groups, transposed=True, precision=plan.precision
    )
    of_weights = functools.partial(
        grouped_matmul.weight_gradients, groups=groups, precision=plan.precision
    )
    has_group = groups.has_group()[:, None]
    dy = jnp.where(has_group, dy, 0)
    # dy lacks the factor `share` until it is multiplied in below, so that dshares comes out too.
    h, activation_vjp = jax.vjp(plan.activation, *products)
    (dh,) = product(dy, (down,))
    dh = exchange.scatter(layout.resize(dh, 1, h.shape[1] * exchange.pes(COLS)), COLS, 1)
    # A row's result is share * y, so d(share) = y . dy. Through `down` that is h . dh, which needs
    # no y. Everything before it has the factor `share`.
    dshares = (h * dh).sum(1, dtype=jnp.float32)
    shared_dy = dy * shares
    dgate, dup = activation_vjp((dh * shares).astype(h.dtype))
    drows = product(dgate, (gate,))[0] + product(dup, (up,))[0]
    hidden = _gather_hidden(h, plan, exchange)
    dweights = (*of_weights((rows, rows), (dgate, dup)), *of_weights((hidden,), (shared_dy,)))
    dweights = tuple(
        exchange.scatter(layout.resize(dw, 1, w.shape[1] * exchange.pes(ROWS)), ROWS, 1)
        for dw, w in zip(dweights, weights, strict=True)
    )
    dbiases: Biases = ()
    if biases:
        expert = groups.group_of_rows()
        dshares = dshares + (dy * _bias_of_rows(biases[2], groups)).sum(1, dtype=jnp.float32)
        dbiases = tuple(
            jnp.zeros(b.shape, jnp.float32).at[expert].add(jnp.where(has_group, d, 0))
            for b, d in zip(biases, (dgate, dup, shared_dy), strict=True)
        )
    return drows, dshares, dweights, dbiases


def _bias_of_rows(bias: Float[Array, "E N"], groups: grouped_matmul.Groups) -> Float[Array, "R N"]:
    """Each row's bias; 0 for a row without an expert."""
    return jnp.where(groups.has_group()[:, None], bias[groups.group_of_rows()], 0)


def _gather_weights(weights: Weights, plan: ExpertsPlan, exchange: Exchange) -> Weights:
    """The experts' weights with all their inputs, for this column's outputs."""
    lengths = (plan.D, plan.D, plan.F)
    return tuple(
        layout.resize(exchange.gather(w, ROWS, 1), 1, length)
        for w, length in zip(weights, lengths, strict=True)
    )


def _gather_hidden(h: Rows, plan: ExpertsPlan, exchange: Exchange) -> Rows:
    return layout.resize(exchange.gather(h, COLS, 1), 1, plan.F)
