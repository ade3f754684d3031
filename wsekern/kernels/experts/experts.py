"""This file is a mixture of experts: each token through the few gated feed-forwards it chose.

N. Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts
Layer", 2017. No token is dropped.

On h x w PEs a row of PEs has n tokens of k choices, hence R = n k rows. A PE receives, for all
tokens, (w-1)/w of n D words of `x` and of R F of the hidden layer, and its column's share of the
experts' weights, (h-1)/h of 3 E D F / w words, some experts at a time; going back about twice that.
Over several wafers, which hold E / wafers experts each, tokens go to those that have their experts
and results come back (see `routing`): 2 (wafers - 1) n D words more at most. It
holds R rows of D and of F.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.kernels.experts import grouped_matmul, routing
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.wafer import Wafer

Weights = tuple[Float[Array, "E _ _"], ...]  # gate and up [E, D, F], down [E, F, D]
Biases = tuple[Float[Array, "E _"], ...]  # of gate and up [E, F], of down [E, D]

_TOKENS = P(WAFERS, ROWS, COLS)
_CHOICES = P(WAFERS, ROWS, None)
_WEIGHT = P(WAFERS, ROWS, COLS)
_BIAS = P(WAFERS, COLS)
_MOST_GATHERED = 32 * 2**20  # bytes of weights that a PE gathers at a time, where they divide


def experts(
    x: Float[Array, "B T D"],
    chosen: Int[Array, "B T k"],
    shares: Float[Array, "B T k"],
    weights: Weights,
    biases: Biases | None = None,
    *,
    activation: Callable[[jax.Array, jax.Array], jax.Array],
    wafer: Wafer | None = None,
) -> Float[Array, "B T D"]:
    """The sum over a token's choices e of `share * down[e](activation(gate[e](x), up[e](x)))`.

    Sums are float32, results of each product `x`'s dtype. Rows are sorted by expert and multiplied
    in blocks by its weight; on a TPU by XLA's own grouped product. What it costs a PE stands at the
    head of this file. Reverse mode only; the gradient keeps both products of the hidden layer where
    there is no wafer, and on one computes them again.

    Args:
      x: tokens, laid out `P("wafer", "y", "x")`.
      chosen: the experts of each token, laid out `P("wafer", "y", None)`; one that is not from 0 to
        E - 1 adds nothing.
      shares: what each of them is weighed by, laid out likewise.
      weights: gate, up and down of all experts, laid out `P("wafer", "y", "x")`.
      biases: of the three, laid out `P("wafer", "x")`; or None.
      activation: an element-wise function of gate and up, that holds no traced values.
      wafer: where to run; by default the current wafer, and one device without one.

    Raises:
      ValueError: the shapes or dtypes do not fit one another, a token chooses more experts than
        there are, or the choices are no integers.
    """
    added = () if biases is None else tuple(biases)
    _check(x, chosen, shares, weights, added)
    wafer = context.resolve(wafer)
    chosen = lax.stop_gradient(chosen.astype(jnp.int32))
    if wafer is None:
        return _local(x, chosen, shares, tuple(weights), added, activation)
    padded = (
        layout.pad(x, _TOKENS, wafer),
        # Rows that fill up the grid are of no expert.
        layout.pad(chosen, _CHOICES, wafer, fill=-1),
        layout.pad(shares, _CHOICES, wafer),
        tuple(layout.pad(w, _WEIGHT, wafer) for w in weights),
        tuple(layout.pad(b, _BIAS, wafer) for b in added),
    )
    how = _How(activation, weights[0].shape[1:], wafer)
    return layout.crop(_experts(*padded, how), x.shape, _TOKENS, wafer)


class _How(NamedTuple):
    """All that is known before anything is traced."""

    activation: Callable
    sizes: tuple[int, ...]  # D and F, without padding
    wafer: Wafer


class _Moves(NamedTuple):
    """What a PE says to others; on one device there are none."""

    gather: Callable[[jax.Array, str, int], jax.Array]
    scatter: Callable[[jax.Array, str, int], jax.Array]
    pes: Callable[[str], int]


_FABRIC = _Moves(fabric.all_gather, fabric.reduce_scatter, fabric.axis_size)
_ALONE = _Moves(lambda x, a, d: x, lambda x, a, d: x, lambda a: 1)


class _Tokens(NamedTuple):
    """Tokens as rows: a row for each choice, sorted by expert."""

    rows: jax.Array  # [R, D]
    shares: jax.Array  # [R, 1]
    groups: grouped_matmul.Groups
    choices: int

    def summed(self, rows: jax.Array) -> jax.Array:
        """The sum of each token's rows, `[n, .]`."""
        return rows[self.groups.place].reshape(-1, self.choices, rows.shape[1]).sum(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _local(x, chosen, shares, weights, biases, activation):
    return _local_fwd(x, chosen, shares, weights, biases, activation)[0]


def _local_fwd(x, chosen, shares, weights, biases, activation):
    D = x.shape[-1]
    tokens = _sorted(x.reshape(-1, D), chosen, shares, weights[0].shape[0])
    y, products = _forward(tokens, weights, biases, activation, _ALONE)
    out = tokens.summed(y * tokens.shares).reshape(x.shape)
    return out.astype(x.dtype), (x, chosen, shares, weights, biases, products)


def _local_bwd(activation, residuals, dout):
    x, chosen, shares, weights, biases, products = residuals
    D = x.shape[-1]
    tokens = _sorted(x.reshape(-1, D), chosen, shares, weights[0].shape[0])
    drows = dout.reshape(-1, D)[tokens.groups.order // tokens.choices]
    dx, dshares, dweights, dbiases = _backward(
        tokens, drows, weights, biases, activation, products, _ALONE
    )
    dx = tokens.summed(dx).reshape(x.shape).astype(x.dtype)
    dshares = dshares[tokens.groups.place].reshape(shares.shape).astype(shares.dtype)
    return dx, None, dshares, _as(dweights, weights), _as(dbiases, biases)


# Loops over groups have no derivative, and plain autodiff would keep every gathered weight.
_local.defvjp(_local_fwd, _local_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _experts(x, chosen, shares, weights, biases, how):
    return _fwd(x, chosen, shares, weights, biases, how)[0]


def _fwd(x, chosen, shares, weights, biases, how):
    specs = (_TOKENS, _CHOICES, _CHOICES, (_WEIGHT,) * 3, (_BIAS,) * len(biases))
    kernel = functools.partial(_per_pe, activation=how.activation, sizes=how.sizes)
    run = how.wafer.map(kernel, in_specs=specs, out_specs=_TOKENS)
    return run(x, chosen, shares, weights, biases), (x, chosen, shares, weights, biases)


def _bwd(how, residuals, dout):
    x, chosen, shares, weights, biases = residuals
    specs = (_TOKENS, _CHOICES, _CHOICES, (_WEIGHT,) * 3, (_BIAS,) * len(biases))
    kernel = functools.partial(_gradient_per_pe, activation=how.activation, sizes=how.sizes)
    outs = (_TOKENS, _CHOICES, (_WEIGHT,) * 3, (_BIAS,) * len(biases))
    run = how.wafer.map(kernel, in_specs=(*specs, _TOKENS), out_specs=outs)
    dx, dshares, dweights, dbiases = run(x, chosen, shares, weights, biases, dout)
    return dx, None, dshares, dweights, dbiases


_experts.defvjp(_fwd, _bwd)


def _per_pe(x, chosen, shares, weights, biases, activation, sizes):
    rows = _rows(x, chosen, shares, sizes)

    def work(route):
        tokens = _received(route, rows, weights[0].shape[0])
        y = fabric.varying(jnp.zeros((tokens.rows.shape[0], x.shape[2]), x.dtype))

        def add(y, part):
            groups, weights, biases = part
            mine = tokens._replace(groups=groups)
            return y + _forward(mine, weights, biases, activation, _FABRIC, sizes)[0], None

        y, _ = _each_part(add, y, tokens.groups, weights, biases, sizes)
        return route.back(tokens.summed(y * tokens.shares))

    out = routing.routed(rows[1], weights[0].shape[0], work)
    return out.reshape(x.shape).astype(x.dtype)


def _gradient_per_pe(x, chosen, shares, weights, biases, dout, activation, sizes):
    rows = _rows(x, chosen, shares, sizes)
    dout = dout.reshape(-1, dout.shape[2])
    work = functools.partial(_gradient, rows, weights, biases, dout, activation, sizes)
    dx, dshares, dweights, dbiases = routing.routed(rows[1], weights[0].shape[0], work)
    dx = layout.resize(dx, 1, x.shape[2] * fabric.axis_size(COLS))
    dx = fabric.reduce_scatter(dx, COLS, 1).reshape(x.shape)
    dshares = fabric.all_reduce(dshares, COLS).reshape(shares.shape)
    dbiases = tuple(fabric.all_reduce(b, ROWS) for b in dbiases)
    return (
        dx.astype(x.dtype),
        dshares.astype(shares.dtype),
        _as(dweights, weights),
        _as(dbiases, biases),
    )


def _gradient(rows, weights, biases, dout, activation, sizes, route):
    """Gradients of a PE: of its rows (partial along x), shares (likewise), weights and biases."""
    tokens = _received(route, rows, weights[0].shape[0])
    dy = route.send(dout)[tokens.groups.order // tokens.choices]

    def add(sums, part):
        groups, weights, biases = part
        mine = tokens._replace(groups=groups)
        _, products = _forward(mine, weights, biases, activation, _FABRIC, sizes)
        drows, dshares, *gradients = _backward(
            mine, dy, weights, biases, activation, products, _FABRIC, sizes
        )
        return (sums[0] + drows, sums[1] + dshares), gradients

    R, D = tokens.rows.shape
    zeros = (jnp.zeros((R, D), jnp.float32), jnp.zeros(R, jnp.float32))
    sums, gradients = _each_part(
        add, jax.tree.map(fabric.varying, zeros), tokens.groups, weights, biases, sizes
    )
    dshares = sums[1][tokens.groups.place].reshape(-1, tokens.choices)
    return route.back(tokens.summed(sums[0])), route.back(dshares), *gradients


def _rows(x, chosen, shares, sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The tokens of this row of PEs, whole, as rows, with their choices and shares."""
    x = layout.resize(fabric.all_gather(x, COLS, 2), 2, sizes[0])
    return tuple(a.reshape(-1, a.shape[2]) for a in (x, chosen, shares))


def _received(route: routing.Route, rows, here) -> _Tokens:
    """The rows that this wafer has an expert for."""
    x, chosen, shares = (route.send(a) for a in rows)
    local = chosen - fabric.axis_index(WAFERS) * here
    local = jnp.where((local >= 0) & (local < here), local, here)
    return _sorted(x, local, shares, here)


def _sorted(x, chosen, shares, count) -> _Tokens:
    k = chosen.shape[-1]
    chosen = jnp.where(chosen < 0, count, chosen)
    groups = grouped_matmul.sort(chosen.reshape(-1), count)
    return _Tokens(x[groups.order // k], shares.reshape(-1)[groups.order][:, None], groups, k)


def _each_part(add, carry, groups, weights, biases, sizes):
    """`add` over the experts, so many at a time as a PE may gather; the results joined."""
    E = weights[0].shape[0]
    held = 3 * sizes[0] * sizes[1] * weights[0].dtype.itemsize // fabric.axis_size(COLS)
    most = max(1, _MOST_GATHERED // max(held, 1))
    parts = next(n for n in range(1, E + 1) if E % n == 0 and E // n <= most)
    if parts == 1:
        return add(carry, (groups, weights, biases))

    def step(carry, given):
        i, weights, biases = given
        return add(carry, (groups.part(i * (E // parts), E // parts), weights, biases))

    split, joined = (
        functools.partial(jax.tree.map, f)
        for f in (
            lambda a: a.reshape(parts, E // parts, *a.shape[1:]),
            lambda a: a.reshape(E, *a.shape[2:]),
        )
    )
    carry, out = lax.scan(step, carry, (jnp.arange(parts), split(weights), split(biases)))
    return carry, joined(out)


def _forward(tokens, weights, biases, activation, moves, sizes=None):
    """What the experts make of the rows, not yet weighed, and both products of the hidden layer."""
    gate, up, down = _whole(weights, moves, sizes)
    products = grouped_matmul.product(tokens.rows, (gate, up), tokens.groups)
    expert = tokens.groups.of_rows() if biases else None
    if biases:
        products = tuple(p + b[expert] for p, b in zip(products, biases[:2], strict=True))
    hidden = _hidden(activation(*products), moves, sizes)
    (y,) = grouped_matmul.product(hidden, (down,), tokens.groups)
    if biases:
        y = y + jnp.where(tokens.groups.have()[:, None], biases[2][expert], 0)
    return y, products


def _backward(tokens, dy, weights, biases, activation, products, moves, sizes=None):
    """Gradients of rows (partial along x), shares (likewise), weights and biases.

    `dy` is that of the sum of rows, sorted: not weighed yet by the shares.
    """
    rows, shares, groups, _ = tokens
    gate, up, down = _whole(weights, moves, sizes)
    dy = jnp.where(groups.have()[:, None], dy, 0)
    h, backward = jax.vjp(activation, *products)
    (dh,) = grouped_matmul.product(dy, (down,), groups, transposed=True)
    dh = moves.scatter(layout.resize(dh, 1, h.shape[1] * moves.pes(COLS)), COLS, 1)
    dshares = (h * dh).sum(1, dtype=jnp.float32)
    wide = dy * shares
    dgate, dup = backward((dh * shares).astype(h.dtype))
    drows = sum(
        grouped_matmul.product(d, (w,), groups, transposed=True)[0]
        for d, w in ((dgate, gate), (dup, up))
    )
    hidden = _hidden(h, moves, sizes)
    dweights = (
        *grouped_matmul.gradient((rows, rows), (dgate, dup), groups),
        *grouped_matmul.gradient((hidden,), (wide,), groups),
    )
    dweights = tuple(
        moves.scatter(layout.resize(dw, 1, w.shape[1] * moves.pes(ROWS)), ROWS, 1)
        for dw, w in zip(dweights, weights, strict=True)
    )
    dbiases: tuple[Any, ...] = ()
    if biases:
        expert = groups.of_rows()
        dshares = dshares + (dy * biases[2][expert]).sum(1, dtype=jnp.float32)
        belong = groups.have()[:, None]
        dbiases = tuple(
            jnp.zeros(b.shape, jnp.float32).at[expert].add(jnp.where(belong, d, 0))
            for b, d in zip(biases, (dgate, dup, wide), strict=True)
        )
    return drows, dshares, dweights, dbiases


def _whole(weights, moves, sizes):
    """The experts' weights with all their inputs, of this column's outputs."""
    if sizes is None:
        return weights
    lengths = (sizes[0], sizes[0], sizes[1])
    return tuple(
        layout.resize(moves.gather(w, ROWS, 1), 1, length)
        for w, length in zip(weights, lengths, strict=True)
    )


def _hidden(h, moves, sizes):
    return h if sizes is None else layout.resize(moves.gather(h, COLS, 1), 1, sizes[1])


def _as(values, like):
    return tuple(v.astype(a.dtype) for v, a in zip(values, like, strict=True))


def _check(x, chosen, shares, weights, biases):
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
    (E, D, F), given = weights[0].shape, [w.shape for w in weights]
    if D != x.shape[2] or given[1:] != [(E, D, F), (E, F, D)]:
        raise ValueError(
            f"experts: weights are {given}: of x {x.shape} they must be [E, {x.shape[2]}, F] twice "
            f"and [E, F, {x.shape[2]}]"
        )
    if chosen.shape[2] > E:
        raise ValueError(f"experts: a token chooses {chosen.shape[2]} experts of {E}")
    wanted = [(E, F), (E, F), (E, D)]
    if biases and [b.shape for b in biases] != wanted:
        raise ValueError(f"experts: biases are {[b.shape for b in biases]}, they must be {wanted}")
    dtypes = {np.dtype(a.dtype) for a in (x, shares, *weights, *biases)}
    if len(dtypes) > 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        names = sorted(dtype.name for dtype in dtypes)
        raise ValueError(f"experts: the operands are {names}, cast them to one floating dtype")
