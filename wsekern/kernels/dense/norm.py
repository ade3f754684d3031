"""RMSNorm and LayerNorm over features that are split along x.

RMSNorm: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019. LayerNorm: J. L.
Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016. The moments of parts are merged as in
T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from wsekern import fabric
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.wafer import Wafer

_FEATURES = P(COLS)


def rms_norm(
    x: Float[Array, "*batch T D"],
    scale: Float[Array, " D"],
    *,
    eps: float = 1e-6,
    features: int | None = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch T D"]:
    """`x / sqrt(mean(x**2) + eps) * scale`, the mean over features, in `x`'s dtype.

    Forward, one all-reduce along x of one word for each row. Backward, another one, and one along y
    and the wafers of a PE's part of `scale`. On a wafer the gradient keeps only `x`, `scale` and
    one word for each row. Computed in float32; reverse mode only.

    Args:
      x: rows to normalize, tiled: rows along y, features along x.
      scale: one factor for each feature, laid out `P("x")`.
      eps: keeps a row of zeros finite.
      features: how many of the D columns are features; by default all. The rest is padding, zero
        in `x`, `scale` and the result.
      wafer: where to run; by default the current wafer, and the plain local operation without one.

    Raises:
      ValueError: the shapes do not fit one another, a dtype is not floating, `eps` is not positive,
        or `features` is not from 1 to D.
    """
    _check("rms_norm", x, scale, None, eps, features)
    wafer = context.resolve(wafer)
    features = x.shape[-1] if features is None else features
    if wafer is None:
        return _local_rms(x, scale, eps, features)
    spec = layout.tiled(x.ndim)
    padded = layout.pad(x, spec, wafer), layout.pad(scale, _FEATURES, wafer)
    return layout.crop(_rms(*padded, float(eps), features, wafer), x.shape, spec, wafer)


def layer_norm(
    x: Float[Array, "*batch T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None = None,
    *,
    eps: float = 1e-5,
    features: int | None = None,
    wafer: Wafer | None = None,
) -> Float[Array, "*batch T D"]:
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over features, in `x`'s dtype.

    Forward, on p PEs along x: where 2 p is at most the features that a PE has of a row, every
    PE's mean and sum of squared deviations are gathered and merged (Chan, Golub and LeVeque's
    formula), in one move of two words for each row and PE. Otherwise two all-reduces of one word
    for each row sum the mean, and then the deviations. Backward, one all-reduce along x of two
    words for each row, and one along y and the wafers of a PE's part of `scale` and `bias`. On a
    wafer the gradient keeps only `x`, `scale` and two words for each row. Computed in float32;
    reverse mode only.

    Args:
      x: rows to normalize, tiled: rows along y, features along x.
      scale: one factor for each feature, laid out `P("x")`.
      bias: added to each feature, laid out `P("x")`; by default nothing.
      eps: keeps a constant row finite.
      features: how many of the D columns are features; by default all. The rest is padding, zero
        in `x`, `scale`, `bias` and the result.
      wafer: where to run; by default the current wafer, and the plain local operation without one.

    Raises:
      ValueError: the shapes do not fit one another, a dtype is not floating, `eps` is not positive,
        or `features` is not from 1 to D.
    """
    _check("layer_norm", x, scale, bias, eps, features)
    wafer = context.resolve(wafer)
    features = x.shape[-1] if features is None else features
    if wafer is None:
        return _local_layer(x, scale, bias, eps, features)
    spec = layout.tiled(x.ndim)
    weights: Weights = (scale,) if bias is None else (scale, bias)
    padded = (layout.pad(x, spec, wafer), tuple(layout.pad(w, _FEATURES, wafer) for w in weights))
    return layout.crop(_layer(*padded, float(eps), features, wafer), x.shape, spec, wafer)


# x, scale and 1 / sqrt(mean(x**2) + eps) of every row.
RmsResiduals = tuple[Float[Array, "*batch T D"], Float[Array, " D"], Float[Array, "*batch T"]]
# One: scale, or two: scale and bias.
Weights = tuple[Float[Array, " D"], ...]
# x, the weights, and mean and 1 / sqrt(variance + eps) of every row.
LayerResiduals = tuple[
    Float[Array, "*batch T D"], Weights, Float[Array, "*batch T"], Float[Array, "*batch T"]
]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms(
    x: Float[Array, "*batch T D"],
    scale: Float[Array, " D"],
    eps: float,
    features: int,
    wafer: Wafer,
) -> Float[Array, "*batch T D"]:
    return _rms_fwd(x, scale, eps, features, wafer)[0]


# Plain autodiff would keep x in float32 too, and move one word a row more.
def _rms_fwd(
    x: Float[Array, "*batch T D"],
    scale: Float[Array, " D"],
    eps: float,
    features: int,
    wafer: Wafer,
) -> tuple[Float[Array, "*batch T D"], RmsResiduals]:
    spec, rows = layout.tiled(x.ndim), layout.tiled(x.ndim - 1, ROWS)
    kernel = functools.partial(_rms_per_pe, eps=eps, features=features)
    y, rstd = wafer.map(kernel, in_specs=(spec, _FEATURES), out_specs=(spec, rows))(x, scale)
    return y, (x, scale, rstd)


def _rms_bwd(
    eps: float,
    features: int,
    wafer: Wafer,
    residuals: RmsResiduals,
    dy: Float[Array, "*batch T D"],
) -> tuple[Float[Array, "*batch T D"], Float[Array, " D"]]:
    spec, rows = layout.tiled(dy.ndim), layout.tiled(dy.ndim - 1, ROWS)
    kernel = functools.partial(_rms_gradients_per_pe, features=features)
    in_specs = (spec, _FEATURES, rows, spec)
    return wafer.map(kernel, in_specs=in_specs, out_specs=(spec, _FEATURES))(*residuals, dy)


_rms.defvjp(_rms_fwd, _rms_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _layer(
    x: Float[Array, "*batch T D"], weights: Weights, eps: float, features: int, wafer: Wafer
) -> Float[Array, "*batch T D"]:
    return _layer_fwd(x, weights, eps, features, wafer)[0]


# A gradient by hand for the same reason as _rms.
def _layer_fwd(
    x: Float[Array, "*batch T D"], weights: Weights, eps: float, features: int, wafer: Wafer
) -> tuple[Float[Array, "*batch T D"], LayerResiduals]:
    spec, rows = layout.tiled(x.ndim), layout.tiled(x.ndim - 1, ROWS)
    kernel = functools.partial(_layer_per_pe, eps=eps, features=features)
    run = wafer.map(kernel, in_specs=(spec, _FEATURES), out_specs=(spec, rows, rows))
    y, mean, rstd = run(x, weights)
    return y, (x, weights, mean, rstd)


def _layer_bwd(
    eps: float,
    features: int,
    wafer: Wafer,
    residuals: LayerResiduals,
    dy: Float[Array, "*batch T D"],
) -> tuple[Float[Array, "*batch T D"], Weights]:
    spec, rows = layout.tiled(dy.ndim), layout.tiled(dy.ndim - 1, ROWS)
    kernel = functools.partial(_layer_gradients_per_pe, features=features)
    in_specs = (spec, _FEATURES, rows, rows, spec)
    return wafer.map(kernel, in_specs=in_specs, out_specs=(spec, _FEATURES))(*residuals, dy)


_layer.defvjp(_layer_fwd, _layer_bwd)


def _rms_per_pe(
    x: Float[Array, "*batch Tt Dt"], scale: Float[Array, " Dt"], eps: float, features: int
) -> tuple[Float[Array, "*batch Tt Dt"], Float[Array, "*batch Tt"]]:
    x32 = x.astype(jnp.float32)
    squares = fabric.all_reduce(jnp.sum(x32 * x32, -1), COLS)
    rstd = lax.rsqrt(squares / features + eps)
    return (x32 * rstd[..., None] * _rowwise(scale, x)).astype(x.dtype), rstd


def _rms_gradients_per_pe(
    x: Float[Array, "*batch Tt Dt"],
    scale: Float[Array, " Dt"],
    rstd: Float[Array, "*batch Tt"],
    dy: Float[Array, "*batch Tt Dt"],
    features: int,
) -> tuple[Float[Array, "*batch Tt Dt"], Float[Array, " Dt"]]:
    dy = dy.astype(jnp.float32)
    # y = n * scale with n = x * rstd: dx = rstd * (dn - n * mean(dn * n)).
    normal = x.astype(jnp.float32) * rstd[..., None]
    dnormal = dy * _rowwise(scale, x)
    along = fabric.all_reduce(jnp.sum(dnormal * normal, -1), COLS) / features
    dx = rstd[..., None] * (dnormal - normal * along[..., None])
    dscale = fabric.all_reduce(_sum_rows(dy * normal), _row_axes(x))
    return dx.astype(x.dtype), dscale.astype(scale.dtype)


def _layer_per_pe(
    x: Float[Array, "*batch Tt Dt"],
    weights: tuple[Float[Array, " Dt"], ...],
    eps: float,
    features: int,
) -> tuple[Float[Array, "*batch Tt Dt"], Float[Array, "*batch Tt"], Float[Array, "*batch Tt"]]:
    x32 = x.astype(jnp.float32)
    mean, variance = _moments(x32, features)
    rstd = lax.rsqrt(variance + eps)
    y = (x32 - mean[..., None]) * rstd[..., None] * _rowwise(weights[0], x)
    if len(weights) > 1:
        y = y + _rowwise(weights[1], x)
    return _zero_padding(y, features).astype(x.dtype), mean, rstd


def _layer_gradients_per_pe(
    x: Float[Array, "*batch Tt Dt"],
    weights: tuple[Float[Array, " Dt"], ...],
    mean: Float[Array, "*batch Tt"],
    rstd: Float[Array, "*batch Tt"],
    dy: Float[Array, "*batch Tt Dt"],
    features: int,
) -> tuple[Float[Array, "*batch Tt Dt"], tuple[Float[Array, " Dt"], ...]]:
    # y = n * scale + bias with n = (x - mean) * rstd:
    # dx = rstd * (dn - mean(dn) - n * mean(dn * n)). Both means travel in one all-reduce.
    dy = _zero_padding(dy.astype(jnp.float32), features)
    normal = _zero_padding((x.astype(jnp.float32) - mean[..., None]) * rstd[..., None], features)
    dnormal = dy * _rowwise(weights[0], x)
    sums = jnp.stack([jnp.sum(dnormal, -1), jnp.sum(dnormal * normal, -1)])
    along = (fabric.all_reduce(sums, COLS) / features)[..., None]
    dx = _zero_padding(rstd[..., None] * (dnormal - along[0] - normal * along[1]), features)
    partial = jnp.stack([_sum_rows(g) for g in (dy * normal, dy)[: len(weights)]])
    dweights = fabric.all_reduce(partial, _row_axes(x))
    return dx.astype(x.dtype), tuple(
        g.astype(w.dtype) for g, w in zip(dweights, weights, strict=True)
    )


def _moments(
    x: Float[Array, "*batch Tt Dt"], features: int
) -> tuple[Float[Array, "*batch Tt"], Float[Array, "*batch Tt"]]:
    """Mean and variance of every row, whose parts lie along x."""
    p, tile = fabric.axis_size(COLS), x.shape[-1]
    # How many of this PE's columns are features; none where it has only padding.
    count = jnp.clip(features - fabric.axis_index(COLS) * tile, 0, tile).astype(jnp.float32)
    mean = jnp.sum(x, -1) / jnp.maximum(count, 1)
    # The sum of squared deviations, not of squares: squares minus the squared mean would cancel.
    m2 = jnp.sum(jnp.square(_zero_padding(x - mean[..., None], features)), -1)
    if 2 * p > tile:  # the gathered pairs would be more words than this PE has of a row
        mean = fabric.all_reduce(count * mean, COLS) / features
        squares = jnp.sum(jnp.square(_zero_padding(x - mean[..., None], features)), -1)
        return mean, fabric.all_reduce(squares, COLS) / features
    means, m2s = fabric.all_gather(jnp.stack([mean, m2])[:, None], COLS, 1, replicated=True)
    counts = jnp.clip(features - tile * jnp.arange(p), 0, tile).astype(jnp.float32)
    counts = counts.reshape(p, *(1,) * mean.ndim)
    mean = jnp.sum(counts * means, 0) / features
    # The deviations from the whole mean are those within the parts and those between their means.
    between = jnp.sum(counts * jnp.square(means - mean[None]), 0)
    return mean, (jnp.sum(m2s, 0) + between) / features


def _zero_padding(x: Float[Array, "*batch Tt Dt"], features: int) -> Float[Array, "*batch Tt Dt"]:
    """`x` with zeros in the columns that are padding."""
    tile = x.shape[-1]
    if fabric.axis_size(COLS) * tile == features:
        return x
    column = fabric.axis_index(COLS) * tile + jnp.arange(tile)
    return jnp.where(_rowwise(column < features, x), x, 0)


def _rowwise(vector: Shaped[Array, " _"], x: Float[Array, "*batch Tt Dt"]) -> Shaped[Array, "..."]:
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _sum_rows(x: Float[Array, "*batch Tt Dt"]) -> Float[Array, " Dt"]:
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _row_axes(x: Float[Array, "*batch Tt Dt"]) -> str | tuple[str, ...]:
    # A matrix is replicated over the wafers: each has all of its rows.
    return (WAFERS, ROWS) if x.ndim > 2 else ROWS


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
# Checkpointed, because plain autodiff would keep x in float32 too.
@functools.partial(jax.jit, static_argnames=("eps", "features"), inline=True)
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(2, 3))
def _local_rms(
    x: Float[Array, "*batch T D"], scale: Float[Array, " D"], eps: float, features: int
) -> Float[Array, "*batch T D"]:
    x32 = x.astype(jnp.float32)
    mean = jnp.sum(x32 * x32, -1, keepdims=True) / features
    return (x32 * lax.rsqrt(mean + eps) * _rowwise(scale, x)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "features"), inline=True)
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(3, 4))
def _local_layer(
    x: Float[Array, "*batch T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"] | None,
    eps: float,
    features: int,
) -> Float[Array, "*batch T D"]:
    x32 = x.astype(jnp.float32)[..., :features]
    mean = jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
    y = (x32 - mean) * lax.rsqrt(variance + eps) * _rowwise(scale[:features], x)
    if bias is not None:
        y = y + _rowwise(bias[:features], x)
    return layout.resize(y, -1, x.shape[-1]).astype(x.dtype)


def _check(
    operation: str,
    x: Shaped[Array, "..."],
    scale: Shaped[Array, "..."],
    bias: Shaped[Array, "..."] | None,
    eps: float,
    features: int | None,
) -> None:
    if x.ndim < 2:
        raise ValueError(
            f"{operation}: x is {x.shape}, it must have two dimensions or more: [..., rows, "
            "features]"
        )
    D = x.shape[-1]
    for name, weight in (("scale", scale), ("bias", bias)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(
                f"{operation}: {name} is {weight.shape} and x is {x.shape}: it must be ({D},), one "
                "number a feature"
            )
    for name, array in (("x", x), ("scale", scale), ("bias", bias)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{operation}: {name} is {array.dtype}; cast it to a floating dtype")
    if isinstance(eps, jax.core.Tracer) or not np.float32(eps) > 0:
        raise ValueError(f"{operation}: eps={eps} must be a number above 0 in float32")
    if features is not None and not 1 <= features <= D:
        raise ValueError(
            f"{operation}: features={features} and x is {x.shape}: it must be from 1 to {D}"
        )
