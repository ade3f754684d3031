"""Products of vectors and a matrix, as decoding needs them: `gemv`.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025 (MeshGEMV): the
matrix never moves. A vector that is split along one axis comes out split along the other, so a
chain of products alternates between the axes and transposes nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int8, Num

from wsekern import fabric
from wsekern.kernels.matmul import epilogue, tile
from wsekern.kernels.matmul.right_factor import (
    ArrayFactor,
    FactorGradient,
    RightFactor,
    check_right_factor,
    is_trained,
)
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import sum_dtype
from wsekern.wafer.wafer import Wafer


def gemv(
    x: Float[Array, "*batch _"],
    b: Float[Array, "_ _"] | Int8[Array, "_ _"],
    *,
    transpose_b: bool = False,
    bias: Float[Array, " N"] | None = None,
    activation: epilogue.Activation = None,
    scales: Float[Array, " N"] | None = None,
    precision: jax.lax.PrecisionLike = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch N"]:
    """`activation(x @ b * scales + bias)` for vectors `x`: one product, and a sum along one axis.

    No word of the matrix moves. On h x w PEs each PE receives what `fabric.all_reduce` takes for
    its N / w columns of each vector: 2 (h - 1) / h of them, in one step; with `transpose_b`,
    2 (w - 1) / w of N / h. On a wafer that is the algorithm with the fewest predicted cycles, for
    one vector the K-tree. Sums are float32 and are rounded once, to `x`'s dtype. The gradient of
    `x` costs as much along the other axis, that of `b` nothing. Reverse mode only.

    Args:
      x: vectors, `[..., K]`, split along y and the same on all PEs along x, `P(..., "y")`; the
        first leading dimension, if any, lies over the wafers. Split along x with `transpose_b`.
      b: the matrix, laid out `P("y", "x")`: `[K, N]`, or `[N, K]` with `transpose_b`. It has `x`'s
        dtype, or is int8 with `scales`.
      transpose_b: whether `b` is taken transposed; the result is then split along y, not x.
      bias: one number an element of the result, laid out like it.
      activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", or an element-wise
        function of an array that holds no traced values.
      scales: the scale of each output channel of int8 weights, laid out like the result.
      precision: of every product, as in `jax.lax.dot_general`; the gradient's too.
      wafer: where to run; by default the current wafer, and plain `jnp` without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ or are not floating, int8
        comes without scales, or `activation` is unknown.
    """
    x, right = layout.as_array(x), RightFactor.of(b, bias, scales)
    _check(x, right, transpose_b)
    function = epilogue.find_activation("gemv", activation)
    wafer = context.resolve(wafer)
    if wafer is None or x.size == 0 or right.matrix.size == 0:
        return _plain(x, right, transpose_b, function, precision)
    options = _GemvOptions("nt" if transpose_b else "nn", function, precision)
    x_spec, y_spec = options.specs(x.ndim)
    shape = (*x.shape[:-1], right.matrix.shape[0 if transpose_b else 1])
    x = layout.pad(x, x_spec, wafer)
    right = jax.tree.map(
        lambda part, spec: layout.pad(part, spec, wafer), right, right.specs(options.y_axis)
    )
    return layout.crop(_product(x, right, options, wafer), shape, y_spec, wafer)


@dataclasses.dataclass(frozen=True)
class _GemvOptions:
    """Everything that is known of a product but its operands."""

    form: tile.Form
    activation: epilogue.Function | None
    precision: jax.lax.PrecisionLike

    @property
    def x_axis(self) -> str:
        """The axis that `x` is split along, and that products are summed along."""
        return COLS if self.form == "nt" else ROWS

    @property
    def y_axis(self) -> str:
        """The axis that the result is split along."""
        return ROWS if self.form == "nt" else COLS

    def specs(self, ndim: int) -> tuple[P, P]:
        """How vectors of `ndim` dimensions lie, and their products."""
        return layout.tiled(ndim, self.x_axis), layout.tiled(ndim, self.y_axis)


def _plain(
    x: Float[Array, "*batch _"],
    right: ArrayFactor,
    transpose_b: bool,
    activation: epilogue.Function | None,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*batch _"]:
    b = right.matrix.T if transpose_b else right.matrix
    if right.scales is not None:
        wide, b = sum_dtype(x.dtype), b.astype(x.dtype)
        y = jnp.matmul(x, b, precision=precision, preferred_element_type=wide)
        y = (y * epilogue.as_row(right.scales, y)).astype(x.dtype)
    else:
        y = jnp.matmul(x, b, precision=precision)
    return epilogue.apply_epilogue(y, right.bias, None, activation)[0].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "*batch _"],
    right: ArrayFactor,
    options: _GemvOptions,
    wafer: Wafer,
) -> Float[Array, "*batch _"]:
    return _forward_program(x, right, options, wafer)(x, right)[0]


def _forward_program(
    x: Float[Array, "*batch _"], right: ArrayFactor, options: _GemvOptions, wafer: Wafer
) -> Callable[..., Any]:
    x_spec, y_spec = options.specs(x.ndim)
    return wafer.map(
        functools.partial(_per_pe, options=options),
        in_specs=(x_spec, right.specs(options.y_axis)),
        out_specs=y_spec,
    )


# Plain autodiff would sum the gradient of `x` over PEs that all hold the same `x`.
def _fwd(
    x: Float[Array, "*batch _"], right: ArrayFactor, options: _GemvOptions, wafer: Wafer
) -> tuple[Float[Array, "*batch _"], tuple]:
    y, argument = _forward_program(x, right, options, wafer)(x, right)
    return y, (x, right, None if options.activation is None else argument)


def _bwd(
    options: _GemvOptions, wafer: Wafer, residuals: tuple, dy: Float[Array, "*batch _"]
) -> tuple[Float[Array, "*batch _"], FactorGradient]:
    x, right, argument = residuals
    if options.activation is not None:
        dy = epilogue.before_activation(dy, argument, options.activation)
    x_spec, y_spec = options.specs(x.ndim)
    right_specs = right.specs(options.y_axis)
    run = wafer.map(
        functools.partial(_per_pe_gradients, options=options),
        in_specs=(x_spec, right_specs, y_spec),
        out_specs=(x_spec, right_specs),
    )
    dx, dright = run(x, right, dy)
    return dx, dright.with_float0(right)


_product.defvjp(_fwd, _bwd)


def _per_pe(
    x: Float[Array, "*batch Kt"], right: ArrayFactor, options: _GemvOptions
) -> tuple[Float[Array, "*batch Nt"], Float[Array, "*batch Nt"]]:
    """This PE's part of the result, and of the activation's argument."""
    sums = _multiply(options.form, x, right.matrix, options.precision)
    sums = fabric.all_reduce(sums, options.x_axis)
    y, argument = epilogue.apply_epilogue(sums, right.bias, right.scales, options.activation)
    return y.astype(x.dtype), argument.astype(x.dtype)


def _per_pe_gradients(
    x: Float[Array, "*batch Kt"],
    right: ArrayFactor,
    dy: Float[Array, "*batch Nt"],
    options: _GemvOptions,
) -> tuple[Float[Array, "*batch Kt"], FactorGradient]:
    form, b, precision = options.form, right.matrix, options.precision
    along = WAFERS if x.ndim > 1 else ()  # with a batch, wafers have different vectors
    wide = dy.astype(sum_dtype(dy.dtype))
    dbias = dscales = db = None
    if right.bias is not None:
        dbias = epilogue.sum_over_rows(wide, right.bias, along)
    if right.scales is not None:
        sums = fabric.all_reduce(_multiply(form, x, b, precision), options.x_axis)
        dscales = epilogue.sum_over_rows(sums * wide, right.scales, along)
        dy = (wide * epilogue.as_row(right.scales, wide)).astype(x.dtype)
    dx = _multiply("nn" if form == "nt" else "nt", dy, b, precision)
    dx = fabric.all_reduce(dx, options.y_axis).astype(x.dtype)
    if is_trained(b):
        left, other = (dy, x) if form == "nt" else (x, dy)
        result = tile.TileResult(b.shape, precision)
        db = tile.product("tn", left[..., None, :], other[..., None, :], result)
        db = (fabric.all_reduce(db, WAFERS) if x.ndim > 1 else db).astype(x.dtype)
    return dx, right.replace(matrix=db, bias=dbias, scales=dscales)


def _multiply(
    form: tile.Form,
    x: Float[Array, "*batch _"],
    b: Num[Array, "_ _"],
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "*batch _"]:
    """The product of vectors, which are rows to `tile.product`."""
    rows = x[None] if x.ndim == 1 else x
    columns = b.shape[0 if form == "nt" else 1]
    result = tile.TileResult((*rows.shape[:-1], columns), precision)
    sums = tile.product(form, rows, b, result)
    return sums[0] if x.ndim == 1 else sums


def _check(x: Num[Array, "..."], right: ArrayFactor, transpose_b: bool) -> None:
    b = right.matrix
    if x.ndim < 1 or b.ndim != 2:
        raise ValueError(
            f"gemv: x is {x.shape} and b is {b.shape}: x must have at least one dimension and b "
            "two; use matmul for other products"
        )
    K, N = b.shape[::-1] if transpose_b else b.shape
    if x.shape[-1] != K:
        side = "columns" if transpose_b else "rows"
        raise ValueError(
            f"gemv: x is {x.shape} and b is {b.shape}: x's length ({x.shape[-1]}) must equal b's "
            f"{side} ({K})"
        )
    check_right_factor("gemv", x, right, N)
