"""A mixture of experts: each token goes through the few gated feed-forwards that it chose.

N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", 2017. No token is dropped.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from wsekern import fabric
from wsekern.kernels.experts import feed_forward, grouped_matmul, routing
from wsekern.kernels.experts.feed_forward import (
    ALONE,
    FABRIC,
    Activation,
    Biases,
    ExpertsPlan,
    Tokens,
    Weights,
)
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.wafer import Wafer

_TOKENS = P(WAFERS, ROWS, COLS)
_CHOICES = P(WAFERS, ROWS, None)
_WEIGHT = P(WAFERS, ROWS, COLS)
_BIAS = P(WAFERS, COLS)
_FEW_WORDS = 4  # weights stay where this many times fewer words move
_MOST_GATHERED = 32 * 2**20  # bytes of weights that a PE gathers at a time, where E divides

Carry = TypeVar("Carry")
_Features = Float[Array, "B T D"]
# x, chosen, shares, weights and biases.
_Operands = tuple[_Features, Int[Array, "B T k"], Float[Array, "B T k"], Weights, Biases]
_FeatureTile = Float[Array, "B Tt Dt"]
_ChoiceTile = Int[Array, "B Tt k"]
_ShareTile = Float[Array, "B Tt k"]
# The tokens of a row of PEs: features, choices and shares.
_TokenRows = tuple[Float[Array, "n D"], Int[Array, "n k"], Float[Array, "n k"]]
_Part = tuple[grouped_matmul.Groups, Weights, Biases]  # of the experts
_RowGradients = tuple[Float[Array, "R D"], Float[Array, " R"]]  # and of shares
_Arrays = tuple[Float[Array, "..."], ...]


def experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    shares: Float[Array, "B T k"],
    weights: Weights,
    biases: Biases | None = None,
    *,
    activation: Activation,
    precision: lax.PrecisionLike = None,
    wafer: Wafer | None = None,
) -> Float[Array, "B T D"]:
    """The sum over a token's choices e of `share * down[e](activation(gate[e](x), up[e](x)))`.

    Products are summed in float32 and rounded to `x`'s dtype. Reverse mode only.

    Algorithm: the rows of tokens, one for each choice, are sorted by expert and multiplied in
    blocks by its weight, so that no token is dropped and nothing is padded.

    Where tokens are few, as in decoding, weights stay: every PE multiplies its part of the features
    of all tokens, and sums along y. Otherwise tokens stay in their row of PEs:

    What a PE receives on h x w PEs, where a row of PEs has n tokens of k choices, hence R = n k
    rows: (w-1)/w of n D words of `x` and of R F of the hidden layer, and the weights of its column
    from the PEs along y, (h-1)/h of 3 E D F / w words, some experts at a time. It holds R rows of D
    and of F. The gradient receives about twice that. Several wafers hold E / wafers experts each:
    tokens go to the wafers of their experts, and results come back, for at most 2 (wafers - 1) n D
    words more; fewer go by buckets (GShard's) where all tokens fit into them. The gradient keeps
    both products of the hidden layer without a wafer; on a wafer it computes them again.

    Args:
      x: tokens, laid out `P("wafer", "y", "x")`.
      chosen: the experts of each token, laid out `P("wafer", "y", None)`. A number outside 0 to
        E - 1 adds nothing.
      shares: the weight of each of them in the sum, laid out likewise.
      weights: gate, up and down of all experts, `[E, D, F]` twice and `[E, F, D]`, laid out
        `P("wafer", "y", "x")`.
      biases: of the three, `[E, F]` twice and `[E, D]`, laid out `P("wafer", "x")`; or None.
      activation: an element-wise function of gate and up, which may hold no traced values.
      precision: of every product, forward and backward, as in `jax.lax.dot_general`.
      wafer: where to run; by default the current wafer, and one device without one.

    Raises:
      ValueError: the shapes or dtypes do not fit one another, a token chooses more experts than
        there are, or the choices are not integers.
    """
    added = () if biases is None else tuple(biases)
    _check(x, chosen, shares, weights, added)
    wafer = context.resolve(wafer)
    chosen = lax.stop_gradient(chosen.astype(jnp.int32))
    _, D, F = weights[0].shape
    plan = ExpertsPlan(activation=activation, precision=precision, D=D, F=F)
    if wafer is None:
        return _local((x, chosen, shares, tuple(weights), added), plan)
    padded = (
        layout.pad(x, _TOKENS, wafer),
        # Rows that only fill up the grid choose no expert.
        layout.pad(chosen, _CHOICES, wafer, fill=-1),
        layout.pad(shares, _CHOICES, wafer),
        tuple(layout.pad(w, _WEIGHT, wafer) for w in weights),
        tuple(layout.pad(b, _BIAS, wafer) for b in added),
    )
    return layout.crop(_experts(padded, plan, wafer), x.shape, _TOKENS, wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _local(operands: _Operands, plan: ExpertsPlan) -> _Features:
    return _local_fwd(operands, plan)[0]


def _local_fwd(operands: _Operands, plan: ExpertsPlan) -> tuple[_Features, tuple]:
    x, chosen, shares, weights, biases = operands
    tokens = feed_forward.sort_tokens(x.reshape(-1, plan.D), chosen, shares, weights[0].shape[0])
    y, products = feed_forward.forward(tokens, weights, biases, plan, ALONE)
    out = tokens.sum_choices(y * tokens.shares).reshape(x.shape)
    return out.astype(x.dtype), (operands, products)


def _local_bwd(plan: ExpertsPlan, residuals: tuple, dout: _Features) -> tuple:
    (x, chosen, shares, weights, biases), products = residuals
    tokens = feed_forward.sort_tokens(x.reshape(-1, plan.D), chosen, shares, weights[0].shape[0])
    dy = dout.reshape(-1, plan.D)[tokens.groups.order // tokens.choices]
    dx, dshares, dweights, dbiases = feed_forward.backward(
        tokens, dy, weights, biases, products, plan, ALONE
    )
    dx = tokens.sum_choices(dx).reshape(x.shape).astype(x.dtype)
    dshares = dshares[tokens.groups.place].reshape(shares.shape).astype(shares.dtype)
    return ((dx, None, dshares, _cast_like(dweights, weights), _cast_like(dbiases, biases)),)


# Loops over groups have no derivative, and plain autodiff would keep every gathered weight.
_local.defvjp(_local_fwd, _local_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _experts(operands: _Operands, plan: ExpertsPlan, wafer: Wafer) -> _Features:
    return _fwd(operands, plan, wafer)[0]


def _fwd(operands: _Operands, plan: ExpertsPlan, wafer: Wafer) -> tuple[_Features, _Operands]:
    plan = dataclasses.replace(plan, weights_stay=_weights_stay(operands, wafer))
    kernel = functools.partial(_per_pe, plan=plan)
    run = wafer.map(kernel, in_specs=_specs(operands), out_specs=_TOKENS)
    return run(*operands), operands


def _weights_stay(operands: _Operands, wafer: Wafer) -> bool:
    """Whether the tokens and hidden features that would move are far less than the weights."""
    (B, T, D), k, (E, _, F) = operands[0].shape, operands[1].shape[2], operands[3][0].shape
    h, w = wafer.height, wafer.width
    tokens = B * T  # of all rows of PEs, and of all wafers
    # All inputs of a token and its results; of each choice the hidden features: gate's and up's
    # sums along y, twice, in float32, and those of all columns.
    by_tokens = tokens * (D + D // w + k * (8 * F // w + F))
    by_weights = (h - 1) * 3 * (E // wafer.wafers) * D * F // (h * w)
    return h > 1 and _FEW_WORDS * by_tokens <= by_weights


def _bwd(plan: ExpertsPlan, wafer: Wafer, operands: _Operands, dout: _Features) -> tuple:
    specs = _specs(operands)
    floats = (specs[0], *specs[2:])
    kernel = functools.partial(_gradient_per_pe, plan=plan)
    run = wafer.map(kernel, in_specs=(*specs, _TOKENS), out_specs=floats)
    dx, *others = run(*operands, dout)
    return ((dx, None, *others),)


def _specs(operands: _Operands) -> tuple:
    return (_TOKENS, _CHOICES, _CHOICES, (_WEIGHT,) * 3, (_BIAS,) * len(operands[4]))


_experts.defvjp(_fwd, _bwd)


def _per_pe(
    x: _FeatureTile,
    chosen: _ChoiceTile,
    shares: _ShareTile,
    weights: Weights,
    biases: Biases,
    plan: ExpertsPlan,
) -> _FeatureTile:
    rows = _token_rows(x, chosen, shares, plan)
    local_experts = weights[0].shape[0]  # experts on this wafer

    def work_in_place(route: routing.Route) -> Float[Array, "n Dt"]:
        tokens = _receive(route, rows, local_experts, of_all_rows=True)
        y = feed_forward.forward_in_place(tokens, weights, biases, plan)
        return route.send_back(fabric.reduce_scatter(tokens.sum_choices(y * tokens.shares), ROWS))

    def work(route: routing.Route) -> Float[Array, "n Dt"]:
        tokens = _receive(route, rows, local_experts)
        y = fabric.varying(jnp.zeros((tokens.rows.shape[0], x.shape[2]), x.dtype))

        def add(y: Float[Array, "R Dt"], part: _Part) -> tuple[Float[Array, "R Dt"], None]:
            groups, weights, biases = part
            of_part = tokens._replace(groups=groups)
            return y + feed_forward.forward(of_part, weights, biases, plan, FABRIC)[0], None

        # A row's expert is in one part; in the others its result is 0.
        y, _ = _for_each_part(add, y, tokens.groups, weights, biases, plan)
        return route.send_back(tokens.sum_choices(y * tokens.shares))

    out = routing.run_routed(rows[1], local_experts, work_in_place if plan.weights_stay else work)
    return out.reshape(x.shape).astype(x.dtype)


def _gradient_per_pe(
    x: _FeatureTile,
    chosen: _ChoiceTile,
    shares: _ShareTile,
    weights: Weights,
    biases: Biases,
    dout: _FeatureTile,
    plan: ExpertsPlan,
) -> tuple[_FeatureTile, _ShareTile, Weights, Biases]:
    rows = _token_rows(x, chosen, shares, plan)
    dout = dout.reshape(-1, dout.shape[2])
    work = functools.partial(_gradient_by_route, rows, weights, biases, dout, plan)
    dx, dshares, dweights, dbiases = routing.run_routed(rows[1], weights[0].shape[0], work)
    # Features were cut to D for the products; pad them to the grid again, to scatter them.
    dx = layout.resize(dx, 1, x.shape[2] * fabric.axis_size(COLS))
    dx = fabric.reduce_scatter(dx, COLS, 1).reshape(x.shape)
    dshares = fabric.all_reduce(dshares, COLS).reshape(shares.shape)
    dbiases = tuple(fabric.all_reduce(b, ROWS) for b in dbiases)
    return (
        dx.astype(x.dtype),
        dshares.astype(shares.dtype),
        _cast_like(dweights, weights),
        _cast_like(dbiases, biases),
    )


def _gradient_by_route(
    rows: _TokenRows,
    weights: Weights,
    biases: Biases,
    dout: Float[Array, "n Dt"],
    plan: ExpertsPlan,
    route: routing.Route,
) -> tuple[Float[Array, "n D"], Float[Array, "n k"], Weights, Biases]:
    """Gradients of this PE's rows and shares (both still to be summed along x) and its weights."""
    tokens = _receive(route, rows, weights[0].shape[0])
    dy = route.send(dout)[tokens.groups.order // tokens.choices]

    def add(sums: _RowGradients, part: _Part) -> tuple[_RowGradients, tuple[Weights, Biases]]:
        # Gate and up are multiplied again: their products of all parts would have to be kept.
        groups, weights, biases = part
        of_part = tokens._replace(groups=groups)
        _, products = feed_forward.forward(of_part, weights, biases, plan, FABRIC)
        drows, dshares, dweights, dbiases = feed_forward.backward(
            of_part, dy, weights, biases, products, plan, FABRIC
        )
        return (sums[0] + drows, sums[1] + dshares), (dweights, dbiases)

    R, D = tokens.rows.shape
    zeros = (jnp.zeros((R, D), jnp.float32), jnp.zeros(R, jnp.float32))
    sums, (dweights, dbiases) = _for_each_part(
        add, jax.tree.map(fabric.varying, zeros), tokens.groups, weights, biases, plan
    )
    dshares = sums[1][tokens.groups.place].reshape(-1, tokens.choices)
    dx = route.send_back(tokens.sum_choices(sums[0]))
    return dx, route.send_back(dshares), dweights, dbiases


def _token_rows(
    x: _FeatureTile, chosen: _ChoiceTile, shares: _ShareTile, plan: ExpertsPlan
) -> _TokenRows:
    """The tokens of this row of PEs as rows with all features, their choices and their shares."""
    x = layout.resize(fabric.all_gather(x, COLS, 2), 2, plan.D)
    rows, chosen, shares = (a.reshape(-1, a.shape[2]) for a in (x, chosen, shares))
    return rows, chosen, shares


def _receive(
    route: routing.Route, rows: _TokenRows, local_experts: int, of_all_rows: bool = False
) -> Tokens:
    """The rows that reach this wafer, sorted by the experts that it has.

    Args:
      route: their way from other wafers.
      rows: of this row of PEs.
      local_experts: how many the wafer has.
      of_all_rows: whether to gather those of all rows of PEs.
    """
    x, chosen, shares = (route.send(a) for a in rows)
    if of_all_rows:
        x, chosen, shares = (fabric.all_gather(a, ROWS, 0) for a in (x, chosen, shares))
    local = chosen - fabric.axis_index(WAFERS) * local_experts
    # The number behind the last expert stands for none: for choices of other wafers' experts, and
    # for empty places of buckets.
    local = jnp.where((local >= 0) & (local < local_experts), local, local_experts)
    return feed_forward.sort_tokens(x, local, shares, local_experts)


def _for_each_part(
    add: Callable[[Carry, _Part], tuple[Carry, Any]],
    carry: Carry,
    groups: grouped_matmul.Groups,
    weights: Weights,
    biases: Biases,
    plan: ExpertsPlan,
) -> tuple[Carry, Any]:
    """`add(carry, part)` over parts of the experts, as large as a PE may gather at a time.

    What `add` returns beside the carry has the experts of its part along its first axis; the parts
    are concatenated.
    """
    E = weights[0].shape[0]
    one_expert = 3 * plan.D * plan.F * weights[0].dtype.itemsize // fabric.axis_size(COLS)
    most = max(1, _MOST_GATHERED // max(one_expert, 1))
    parts = next(n for n in range(1, E + 1) if E % n == 0 and E // n <= most)
    if parts == 1:
        return add(carry, (groups, weights, biases))

    def step(carry: Carry, part: tuple[Int[Array, ""], Weights, Biases]) -> tuple[Carry, Any]:
        i, weights, biases = part
        return add(carry, (groups.select(i * (E // parts), E // parts), weights, biases))

    split = functools.partial(jax.tree.map, lambda a: a.reshape(parts, E // parts, *a.shape[1:]))
    carry, out = lax.scan(step, carry, (jnp.arange(parts), split(weights), split(biases)))
    return carry, jax.tree.map(lambda a: a.reshape(E, *a.shape[2:]), out)


def _cast_like(values: _Arrays, like: _Arrays) -> _Arrays:
    return tuple(v.astype(a.dtype) for v, a in zip(values, like, strict=True))


def _check(
    x: Shaped[Array, "..."],
    chosen: Shaped[Array, "..."],
    shares: Shaped[Array, "..."],
    weights: Weights,
    biases: Biases,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"experts: x is {x.shape}, it must be [B, T, D]")
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"experts: chosen is {chosen.dtype}; cast it to an integer dtype")
    if chosen.ndim != 3 or chosen.shape[:2] != x.shape[:2] or shares.shape != chosen.shape:
        raise ValueError(
            f"experts: chosen is {chosen.shape} and shares {shares.shape}: both must be "
            f"({x.shape[0]}, {x.shape[1]}, k), as x is {x.shape}"
        )
    if len(weights) != 3 or any(w.ndim != 3 for w in weights):
        raise ValueError("experts: weights must be gate [E, D, F], up [E, D, F], down [E, F, D]")
    (E, D, F), shapes = weights[0].shape, [w.shape for w in weights]
    if D != x.shape[2] or shapes[1:] != [(E, D, F), (E, F, D)]:
        raise ValueError(
            f"experts: weights are {shapes}: for x {x.shape} they must be [E, {x.shape[2]}, F] "
            f"twice and [E, F, {x.shape[2]}]"
        )
    if chosen.shape[2] > E:
        raise ValueError(f"experts: a token chooses {chosen.shape[2]} experts of {E}")
    bias_shapes = [(E, F), (E, F), (E, D)]
    if biases and [b.shape for b in biases] != bias_shapes:
        raise ValueError(
            f"experts: biases are {[b.shape for b in biases]}, they must be {bias_shapes}"
        )
    dtypes = {np.dtype(a.dtype) for a in (x, shares, *weights, *biases)}
    if len(dtypes) > 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        names = sorted(dtype.name for dtype in dtypes)
        raise ValueError(f"experts: the operands are {names}, cast them to one floating dtype")
