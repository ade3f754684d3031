"""This file is the matrix product: `matmul`, its gradient, and what it refuses.

Costs are of one product on h x w PEs, received by a PE: X and Y are the words of its
tiles of `a` and `b` (of the result and `b` in `a @ b^T`, of `a` and the result in `a^T @ b`),
S those of the third; what is summed is float32.

- `allgather`: (w - 1) X + (h - 1) Y words in 2 steps; w X + h Y are held.
- `summa`: w X + h Y words in 2 max(h, w) floods that wait for nothing (a panel of the result, X in
  `a @ b^T` and Y in `a^T @ b`, is summed instead); one panel of each is held.
- `cannon`: p (X + Y) words in 2 p steps on p x p, and two tiles of each are held. Where L =
  lcm(h, w) <= 2 max(h, w), also on rectangles: L - 1 shifts of w / L of X and h / L of Y, after
  skews by the binary digits of the distance. A wafer has edges: a wrap is as long as the grid.
- `mesh`: Cannon's shifts on a ring folded onto the line: no word goes further than two hops. On
  rectangles X and Y (or the sums) are first, or last, moved to their place in it, once each.
- `collective`: as many words as `allgather`, of which those along one axis (x if h Y <= w X)
  are halves of tiles that go round both ways while others are multiplied, in 2 w - 1 steps
  (2 h - 1 along y); h Y and two tiles of X are held (w X and two of Y).
- `stationary`: Y stays. All rows of X are gathered, (h - 1) X words, those that meet Y flooded,
  M K / h, and the sums scattered, (h - 1) S, in 3 steps; these rows are held. Of M <= h / 2 rows
  only the true ones are flooded and summed: M / h of h X, and of 2 (h - 1) S. Of many rows `auto`
  takes r rounds of a share of them each: 3 r steps, as many words, an r-th held; `a^T @ b`, and
  the gradient that it is, then takes `summa`.
- `2.5d`: for matrices that all c wafers hold: each does a c-th of the steps of `mesh`, then
  2 (c - 1) / c S words in one more step (half of that of X or Y in the other forms).

"auto" takes, on devices, `stationary` where that moves a quarter of what a gather would; else
`allgather` while what it gathers is at most 4 MiB on emulated devices or a 64th of an accelerator's
memory; beyond that `stationary` in rounds, or `summa` where the rows do not divide into such. On a
wafer (virtual, abstract): the fewest predicted cycles within a quarter of a PE's SRAM.
"""

import functools
import math
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from wsekern import fabric
from wsekern.kernels.matmul import (
    allgather,
    cannon,
    choice,
    epilogue,
    explain,
    overlapped,
    replicated,
    stationary,
    summa,
    tile,
)
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import sum_dtype
from wsekern.wafer.wafer import Wafer

Algorithm = Literal[
    "auto", "allgather", "summa", "cannon", "mesh", "collective", "stationary", "2.5d"
]
Right = Float[Array, "... K N"] | Int8[Array, "... K N"]
_KERNELS: dict[str, Any] = {
    "allgather": allgather,
    "summa": summa,
    "cannon": cannon,
    "mesh": cannon,
    "collective": overlapped,
    "stationary": stationary,
    "2.5d": replicated,
}


class _How(NamedTuple):
    """All that is known of a product before it is traced."""

    form: tile.Form
    plan: choice.Plan
    activation: Any
    tiles: tuple[tuple[int, int], ...]  # rows and columns of a PE's tile of each result
    wafer: Wafer


@overload
def matmul(
    a: Float[Array, "*batch M K"],
    b: Right,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Float[Array, " N"] | None = None,
    activation: epilogue.Activation = None,
    scales: Float[Array, " N"] | None = None,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> Float[Array, "*batch M N"]: ...


@overload
def matmul(
    a: Float[Array, "*batch M K"],
    b: tuple[Right, ...],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: tuple[Float[Array, " _"] | None, ...] | None = None,
    activation: epilogue.Activation = None,
    scales: tuple[Float[Array, " _"], ...] | None = None,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> tuple[Float[Array, "*batch M _"], ...]: ...


def matmul(
    a,
    b,
    *,
    transpose_a=False,
    transpose_b=False,
    bias=None,
    activation=None,
    scales=None,
    algorithm="auto",
    wafer=None,
):
    """`activation(a @ b * scales + bias)`; of a tuple of right factors, the tuple of products.

    `a @ b^T` and `a^T @ b` are forms of every algorithm, in which another of the three matrices
    moves; nothing is transposed or laid out anew. They are one another's gradients, and the
    gradient takes the same algorithm. Products that share their left factor (query, key and value;
    gate and up) are best asked for in one call: it then moves once, and the right factors as one.
    Sums are float32, `scales`, `bias` and `activation` are applied to them, and the result is
    rounded once, to `a`'s dtype. The gradient keeps the operands and, if there is an activation,
    what it was taken of, in `a`'s dtype; that of `scales` multiplies once more. Reverse mode only.

    Costs stand at the head of this file, and in numbers in `print(wk.matmul.explain(...))`.

    Args:
      a: left factor, laid out `P("y", "x")`; leading dimensions, if any, `P("wafer", None, ...)`.
        `[..., K, M]` with `transpose_a`.
      b: right factor, laid out likewise: a matrix, the same for all leading dimensions of `a`, or
        one with these leading dimensions; or a tuple of either. `[..., N, K]` with `transpose_b`.
        Of `a`'s dtype, or int8 with `scales`.
      transpose_a: whether `a` is taken transposed; not together with `transpose_b`.
      transpose_b: whether `b` is taken transposed.
      bias: one for each column of the result, laid out `P("x")`; of a tuple, a tuple or None.
      activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", or an element-wise
        function of an array that holds no traced values.
      scales: the scale of each output channel of int8 weights, laid out `P("x")`; likewise.
      algorithm: one of those at the head of this file, or "auto".
      wafer: where to run; by default the current wafer, and plain `jnp` without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ or are not floating, int8
        comes without scales, both factors are transposed, or `activation` or `algorithm` is
        unknown, or cannot serve the grid.
    """
    several = isinstance(b, tuple | list)
    a, bs = layout.as_array(a), tuple(map(layout.as_array, b if several else (b,)))
    biases, scales = (
        _each(n, v, several, len(bs)) for n, v in (("bias", bias), ("scales", scales))
    )
    form = tile.form("matmul", transpose_a, transpose_b)
    _check(form, a, bs, biases, scales, algorithm)
    activation = epilogue.function("matmul", activation)
    wafer = context.resolve(wafer)
    if wafer is None or 0 in (*a.shape, *(n for one in bs for n in one.shape)):
        cs = tuple(
            _plain(form, a, *ends, activation) for ends in zip(bs, biases, scales, strict=True)
        )
    else:
        cs = _on(wafer, form, a, bs, biases, scales, activation, algorithm)
    return cs if several else cs[0]


def _plain(form, a, b, bias, scales, activation):
    a = jnp.swapaxes(a, -1, -2) if form == "tn" else a
    b = jnp.swapaxes(b, -1, -2) if form == "nt" else b
    if scales is not None:
        c = jnp.matmul(a, b.astype(a.dtype), preferred_element_type=sum_dtype(a.dtype))
        c = (c * epilogue.along_last(scales, c)).astype(a.dtype)
    else:
        c = jnp.matmul(a, b)
    c = epilogue.applied(c, bias, None, activation)[0]
    return c if c.dtype == a.dtype else c.astype(a.dtype)


def _on(wafer, form, a, bs, biases, scales, activation, algorithm):
    plan = choice.plan(choice.problem(form, a, bs, wafer), algorithm)
    shapes = [_result(form, a, b) for b in bs]
    units = {"tn": (plan.unit, 1), "nt": (1, plan.unit)}.get(form, (1, 1))
    tiles = tuple(
        (_tile(rows, wafer.height, units[0]), _tile(columns, wafer.width, units[1]))
        for *_, rows, columns in shapes
    )
    # The meeting dimension is the last of X and the last but one of Y, see tile_product.
    a = _padded(a, wafer, (1, plan.unit) if form != "nt" else (1, 1))
    bs = tuple(_padded(b, wafer, (plan.unit, 1) if form != "tn" else (1, 1)) for b in bs)
    ends = (
        tuple(
            v if v is None else _grown(v, t[1] * wafer.width, wafer)
            for v, t in zip(vs, tiles, strict=True)
        )
        for vs in (biases, scales)
    )
    cs = _product(a, bs, *ends, _How(form, plan, activation, tiles, wafer))
    spec = layout.tiled(a.ndim)
    return tuple(layout.crop(c, shape, spec, wafer) for c, shape in zip(cs, shapes, strict=True))


def _result(form, a, b):
    rows, columns = a.shape[-1 if form == "tn" else -2], b.shape[-2 if form == "nt" else -1]
    return (*a.shape[:-2], rows, columns)


def _tile(size: int, pes: int, unit: int) -> int:
    multiple = math.lcm(pes, unit)
    return -(-size // multiple) * multiple // pes


def _padded(x, wafer, units):
    rows = _tile(x.shape[-2], wafer.height, units[0]) * wafer.height
    columns = _tile(x.shape[-1], wafer.width, units[1]) * wafer.width
    wider = tile.sized(tile.sized(x, -2, rows), -1, columns)
    return layout.pad(wider, layout.tiled(x.ndim), wafer)


def _grown(vector, length, wafer):
    return layout.pad(tile.sized(vector, -1, length), layout.tiled(1, COLS), wafer)


matmul.explain = explain.explain_matmul  # type: ignore[attr-defined]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _product(a, bs, biases, scales, how):
    return _run(a, bs, biases, scales, how, keep=False)[0]


def _run(a, bs, biases, scales, how, keep):
    specs = layout.tiled(a.ndim), tuple(layout.tiled(b.ndim) for b in bs)
    ends = layout.tiled(1, COLS)
    kernel = functools.partial(_per_pe, how=how, keep=keep)
    run = how.wafer.map(kernel, in_specs=(*specs, ends, ends), out_specs=(specs[0], specs[0]))
    return run(a, bs, biases, scales)


# Plain autodiff would keep what has moved.
def _fwd(a, bs, biases, scales, how):
    keep = how.activation is not None
    cs, before = _run(a, bs, biases, scales, how, keep)
    return cs, (a, bs, biases, scales, before)


def _bwd(how, residuals, dcs):
    a, bs, biases, scales, before = residuals
    if how.activation is not None:
        dcs = tuple(_before_activation(how, dc, x) for dc, x in zip(dcs, before, strict=True))
    spec, ends = layout.tiled(a.ndim), layout.tiled(1, COLS)
    b_specs = tuple(layout.tiled(b.ndim) for b in bs)
    run = how.wafer.map(
        functools.partial(_per_pe_gradients, how=how),
        in_specs=(spec, b_specs, ends, ends, spec),
        out_specs=(
            spec,
            tuple(s for s, b in zip(b_specs, bs, strict=True) if _learns(b)),
            ends,
            ends,
        ),
    )
    da, dbs, dbiases, dscales = run(a, bs, biases, scales, dcs)
    of_b = iter(dbs)
    dbs = tuple(next(of_b) if _learns(b) else np.zeros(b.shape, jax.dtypes.float0) for b in bs)
    return da, dbs, dbiases, dscales


_product.defvjp(_fwd, _bwd)


def _before_activation(how, dc, x):
    # Element by element, so it may stand outside the kernel, in which nothing is differentiated.
    wide = x.astype(sum_dtype(x.dtype))
    (dx,) = jax.vjp(how.activation, wide)[1](dc.astype(wide.dtype))
    return dx.astype(dc.dtype)


def _learns(b) -> bool:
    return jnp.issubdtype(b.dtype, jnp.floating)


def _per_pe(a, bs, biases, scales, how, keep):
    sums = _products(a, bs, how)
    ends = (
        epilogue.applied(s, bias, scale, how.activation)
        for s, bias, scale in zip(sums, biases, scales, strict=True)
    )
    cs, before = zip(*((c.astype(a.dtype), x.astype(a.dtype)) for c, x in ends), strict=True)
    return cs, before if keep else ()


def _per_pe_gradients(a, bs, biases, scales, dcs, how):
    along = (ROWS, WAFERS) if a.ndim > 2 else ROWS  # other wafers have other rows

    def summed(columns, like):
        by_column = jnp.sum(columns, tuple(range(columns.ndim - 1)))
        return fabric.all_reduce(by_column, along).astype(like.dtype)

    wide = [dc.astype(sum_dtype(dc.dtype)) for dc in dcs]
    dbiases = tuple(
        None if b is None else summed(dc, b) for b, dc in zip(biases, wide, strict=True)
    )
    if scales[0] is None:
        dscales = scales
    else:
        pairs = zip(_products(a, bs, how), wide, scales, strict=True)
        dscales = tuple(summed(sums * dc, s) for sums, dc, s in pairs)
        dcs = tuple(
            (dc * epilogue.along_last(s, dc)).astype(a.dtype)
            for dc, s in zip(wide, scales, strict=True)
        )
    da, dbs = _gradients(a, bs, dcs, how)
    if a.ndim > 2:  # every wafer has the same matrices, and other rows
        dbs = [fabric.all_reduce(db, WAFERS) if db.ndim == 2 else db for db in dbs]
    return da.astype(a.dtype), tuple(db.astype(a.dtype) for db in dbs), dbiases, dscales


def _products(a, bs, how):
    """The sums of each product on this PE."""
    run, leading = _of_plan(how.form, how.plan), a.shape[:-2]
    shapes = [(*leading, *tile_) for tile_ in how.tiles]
    if how.form == "nt":  # `a` stays: there is nothing to share
        return [run(a, b, shape) for b, shape in zip(bs, shapes, strict=True)]
    rows, columns = how.tiles[0][0], sum(columns for _, columns in how.tiles)
    return _apart(run(a, _together(bs), (*leading, rows, columns)), bs)


def _gradients(a, bs, dcs, how):
    """The sums of the gradient of `a` and of each of `bs` that is not of integers."""
    if how.form == "nt":
        each = [_pair(a, b, dc, how) for b, dc in zip(bs, dcs, strict=True)]
        return functools.reduce(jnp.add, [da for da, _ in each]), [
            db for _, db in each if db is not None
        ]
    da, db = _pair(a, _together(bs), _together(dcs), how)
    return da, [] if db is None else _apart(db, bs)


def _pair(a, b, dc, how):
    factors = {"a": a, "b": b, "c": dc}
    of_a, of_b = (
        functools.partial(_of_plan(form, how.plan), factors[left], factors[right])
        for form, left, right in tile.GRADIENTS[how.form]
    )
    return of_a(a.shape), of_b(b.shape) if _learns(b) else None


def _of_plan(form: tile.Form, plan: choice.Plan):
    options = dict(plan.options)
    if "inner" in options:
        options["inner"] = _of_plan(form, options["inner"])
    if form == "tn" and "rounds" in options:
        return summa.tn
    return functools.partial(getattr(_KERNELS[plan.algorithm], form), **options)


def _together(tiles: tuple[jax.Array, ...]) -> jax.Array:
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, -1)


def _apart(joined: jax.Array, like: tuple[jax.Array, ...]) -> list[jax.Array]:
    return jnp.split(joined, np.cumsum([x.shape[-1] for x in like])[:-1], -1)


def _each(name, value, several, count):
    if value is None:
        return (None,) * count
    values = tuple(value) if several else (value,)
    if several and (not isinstance(value, tuple | list) or len(values) != count):
        raise ValueError(
            f"matmul: {name} must be a tuple of {count}, one for each right factor, or None"
        )
    return tuple(v if v is None else layout.as_array(v) for v in values)


def _check(form, a, bs, biases, scales, algorithm):
    if not bs:
        raise ValueError("matmul: b is an empty tuple; give at least one right factor")
    for b, *ends in zip(bs, biases, scales, strict=True):
        tile.check("matmul", form, a, b)
        epilogue.check("matmul", a, b, b.shape[-2 if form == "nt" else -1], *ends)
    if len({b.dtype for b in bs}) > 1:
        raise ValueError(
            f"matmul: the right factors are {[str(b.dtype) for b in bs]}; make them alike, or call "
            "once for each dtype"
        )
    if algorithm not in ("auto", *_KERNELS):
        known = ", ".join(repr(name) for name in ("auto", *_KERNELS))
        raise ValueError(f"matmul: algorithm={algorithm!r} is not one of {known}")
