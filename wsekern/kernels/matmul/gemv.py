"""This file is the product of vectors and a matrix, of which a decode step is made: `gemv`.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025 (MeshGEMV): the
matrix never moves, and a vector split along one axis comes out split along the other, so that a
chain of products alternates between the axes and nothing is ever transposed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from wsekern import fabric
from wsekern.kernels.matmul import epilogue, tile
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import sum_dtype
from wsekern.wafer.wafer import Wafer


def gemv(
    x: Float[Array, "*batch K"],
    b: Float[Array, "_ _"] | Int8[Array, "_ _"],
    *,
    transpose_b: bool = False,
    bias: Float[Array, " N"] | None = None,
    activation: epilogue.Activation = None,
    scales: Float[Array, " N"] | None = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch N"]:
    """`activation(x @ b * scales + bias)` of vectors, in one product and one sum along one axis.

    On h x w PEs a PE receives what `fabric.all_reduce` of its N / w columns (for each vector)
    takes: 2 (h - 1) / h of them in one step; with `transpose_b` 2 (w - 1) / w of N / h. On a wafer
    that is the algorithm of the fewest predicted cycles, the K-tree for one. No word of the matrix
    moves. Sums are float32, rounded once to `x`'s dtype. The gradient of `x` costs as much along
    the other axis, that of `b` nothing. Reverse mode only.

    Args:
      x: vectors, `[..., K]`, split along y and the same on all PEs along x, `P(..., "y")`; the
        first leading dimension, if any, lies over the wafers. With `transpose_b` along x.
      b: the matrix, laid out `P("y", "x")`; `[N, K]` with `transpose_b`. `x`'s dtype, or int8.
      transpose_b: whether `b` is taken transposed; the result is then split along y, not x.
      bias: one for each element of the result, laid out as it.
      activation: a name or a function, as in `matmul`.
      scales: the scale of each output channel of int8 weights, laid out as the result.
      wafer: where to run; by default the current wafer, and plain `jnp` without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ or are not floating, int8
        comes without scales, or `activation` is unknown.
    """
    x, b = layout.as_array(x), layout.as_array(b)
    _check(x, b, transpose_b, bias, scales)
    activation = epilogue.function("gemv", activation)
    wafer = context.resolve(wafer)
    if wafer is None or 0 in (*x.shape, *b.shape):
        return _plain(x, b, transpose_b, bias, scales, activation)
    of_x, of_y = (COLS, ROWS) if transpose_b else (ROWS, COLS)
    shape = (*x.shape[:-1], b.shape[0 if transpose_b else 1])
    x = layout.pad(x, layout.tiled(x.ndim, of_x), wafer)
    b = layout.pad(b, layout.tiled(2), wafer)
    bias, scales = (
        v if v is None else layout.pad(jnp.asarray(v), layout.tiled(1, of_y), wafer)
        for v in (bias, scales)
    )
    y = _product(x, b, bias, scales, activation, transpose_b, wafer)
    return layout.crop(y, shape, layout.tiled(x.ndim, of_y), wafer)


def _plain(x, b, transpose_b, bias, scales, activation):
    b = b.T if transpose_b else b
    if scales is not None:
        y = jnp.matmul(x, b.astype(x.dtype), preferred_element_type=sum_dtype(x.dtype))
        y = (y * epilogue.along_last(jnp.asarray(scales), y)).astype(x.dtype)
    else:
        y = jnp.matmul(x, b)
    bias = None if bias is None else jnp.asarray(bias)
    return epilogue.applied(y, bias, None, activation)[0].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _product(x, b, bias, scales, activation, transpose_b, wafer):
    return _run(x, b, bias, scales, activation, transpose_b, wafer)[0]


def _run(x, b, bias, scales, activation, transpose_b, wafer):
    of_x, of_y = (COLS, ROWS) if transpose_b else (ROWS, COLS)
    ends = layout.tiled(1, of_y)
    kernel = functools.partial(
        _per_pe, activation=activation, form="nt" if transpose_b else "nn", along=of_x
    )
    run = wafer.map(
        kernel,
        in_specs=(layout.tiled(x.ndim, of_x), layout.tiled(2), ends, ends),
        out_specs=layout.tiled(x.ndim, of_y),
    )
    return run(x, b, bias, scales)


# Plain autodiff would sum the gradient of `x` over PEs that hold the same.
def _fwd(x, b, bias, scales, activation, transpose_b, wafer):
    y, before = _run(x, b, bias, scales, activation, transpose_b, wafer)
    return y, (x, b, bias, scales, None if activation is None else before)


def _bwd(activation, transpose_b, wafer, residuals, dy):
    x, b, bias, scales, before = residuals
    if activation is not None:
        wide = before.astype(sum_dtype(before.dtype))
        dy = jax.vjp(activation, wide)[1](dy.astype(wide.dtype))[0].astype(dy.dtype)
    of_x, of_y = (COLS, ROWS) if transpose_b else (ROWS, COLS)
    x_spec, y_spec, ends = (
        layout.tiled(x.ndim, of_x),
        layout.tiled(x.ndim, of_y),
        layout.tiled(1, of_y),
    )
    learns = jnp.issubdtype(b.dtype, jnp.floating)
    kernel = functools.partial(
        _per_pe_gradients, form="nt" if transpose_b else "nn", along=of_y, across=of_x
    )
    run = wafer.map(
        kernel,
        in_specs=(x_spec, layout.tiled(2), ends, ends, y_spec),
        out_specs=(x_spec, layout.tiled(2) if learns else (), ends, ends),
    )
    dx, db, dbias, dscales = run(x, b, bias, scales, dy)
    return dx, db if learns else np.zeros(b.shape, jax.dtypes.float0), dbias, dscales


_product.defvjp(_fwd, _bwd)


def _per_pe(x, b, bias, scales, activation, form, along):
    sums = fabric.all_reduce(_row(form, x, b), along)
    y, before = epilogue.applied(sums, bias, scales, activation)
    return y.astype(x.dtype), before.astype(x.dtype)


def _per_pe_gradients(x, b, bias, scales, dy, form, along, across):
    def summed(columns, like):
        by_column = jnp.sum(columns, tuple(range(columns.ndim - 1)))
        total = fabric.all_reduce(by_column, WAFERS) if x.ndim > 1 else by_column
        return total.astype(like.dtype)

    wide = dy.astype(sum_dtype(dy.dtype))
    dbias = None if bias is None else summed(wide, bias)
    dscales = None
    if scales is not None:
        dscales = summed(fabric.all_reduce(_row(form, x, b), across) * wide, scales)
        dy = (wide * epilogue.along_last(scales, wide)).astype(x.dtype)
    dx = fabric.all_reduce(_row("nn" if form == "nt" else "nt", dy, b), along)
    if not jnp.issubdtype(b.dtype, jnp.floating):
        return dx.astype(x.dtype), (), dbias, dscales
    left, right = (dy, x) if form == "nt" else (x, dy)
    db = tile.product("tn", left[..., None, :], right[..., None, :], 2)
    db = fabric.all_reduce(db, WAFERS) if x.ndim > 1 else db
    return dx.astype(x.dtype), db.astype(x.dtype), dbias, dscales


def _row(form, x, b):
    """The product of vectors `[..., K]`, which are rows to `tile.product`."""
    rows = x[None] if x.ndim == 1 else x
    sums = tile.product(form, rows, b, rows.ndim)
    return sums[0] if x.ndim == 1 else sums


def _check(x, b, transpose_b, bias, scales):
    if x.ndim < 1 or b.ndim != 2:
        raise ValueError(
            f"gemv: x is {x.shape} and b is {b.shape}: x must have at least one dimension and b "
            "two; use matmul for other products"
        )
    K, N = b.shape[::-1] if transpose_b else b.shape
    if x.shape[-1] != K:
        what = "columns" if transpose_b else "rows"
        raise ValueError(
            f"gemv: x is {x.shape} and b is {b.shape}: x's length ({x.shape[-1]}) must equal b's "
            f"{what} ({K})"
        )
    ends = (v if v is None else jnp.asarray(v) for v in (bias, scales))
    epilogue.check("gemv", x, b, N, *ends)
