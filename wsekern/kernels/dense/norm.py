"""This file is normalization over features that are split along x.

RMSNorm: B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", 2019. LayerNorm: J. L.
Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", 2016. Moments of parts are joined as in T.
F. Chan, G. H. Golub and R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

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

    Computed in float32. Forward, one all-reduce along x of one word a row; backward, another one,
    and one along y and the wafers of a PE's part of `scale`. On a wafer nothing is kept but `x`,
    `scale` and one word a row. Reverse mode only.

    Args:
      x: rows to normalize, tiled: rows along y, features along x.
      scale: one factor a feature, laid out `P("x")`.
      eps: what keeps a row of zeros finite.
      features: how many of the D columns are features; the rest is padding, zero in `x`, `scale`
        and result. By default all.
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

    Computed in float32. Forward, each PE's mean and squared deviations are gathered along x and
    joined, in one move of two words a row, while what is gathered is less than the PE has of a row;
    else the mean and then the deviations are summed, in two moves of one word. Backward, one
    all-reduce along x of two words a row, and one along y and the wafers of a PE's part of `scale`
    and `bias`. On a wafer nothing is kept but `x`, `scale` and two words a row. Reverse mode only.

    Args:
      x: rows to normalize, tiled: rows along y, features along x.
      scale: one factor a feature, laid out `P("x")`.
      bias: what is added to each feature, laid out `P("x")`; nothing by default.
      eps: what keeps a constant row finite.
      features: how many of the D columns are features; the rest is padding, zero in `x`, `scale`,
        `bias` and result. By default all.
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
    weights = (scale,) if bias is None else (scale, bias)
    padded = (layout.pad(x, spec, wafer), tuple(layout.pad(w, _FEATURES, wafer) for w in weights))
    return layout.crop(_layer(*padded, float(eps), features, wafer), x.shape, spec, wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _rms(x, scale, eps, features, wafer):
    return _rms_fwd(x, scale, eps, features, wafer)[0]


# Plain autodiff would keep x in float32 too, and move one word a row more.
def _rms_fwd(x, scale, eps, features, wafer):
    spec, rows = layout.tiled(x.ndim), layout.tiled(x.ndim - 1, ROWS)
    kernel = functools.partial(_rms_per_pe, eps=eps, features=features)
    y, rstd = wafer.map(kernel, in_specs=(spec, _FEATURES), out_specs=(spec, rows))(x, scale)
    return y, (x, scale, rstd)


def _rms_bwd(eps, features, wafer, residuals, dy):
    spec, rows = layout.tiled(dy.ndim), layout.tiled(dy.ndim - 1, ROWS)
    kernel = functools.partial(_rms_gradients_per_pe, features=features)
    in_specs = (spec, _FEATURES, rows, spec)
    return wafer.map(kernel, in_specs=in_specs, out_specs=(spec, _FEATURES))(*residuals, dy)


_rms.defvjp(_rms_fwd, _rms_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _layer(x, weights, eps, features, wafer):
    return _layer_fwd(x, weights, eps, features, wafer)[0]


# For the reason given for _rms.
def _layer_fwd(x, weights, eps, features, wafer):
    spec, rows = layout.tiled(x.ndim), layout.tiled(x.ndim - 1, ROWS)
    kernel = functools.partial(_layer_per_pe, eps=eps, features=features)
    run = wafer.map(kernel, in_specs=(spec, _FEATURES), out_specs=(spec, rows, rows))
    y, mean, rstd = run(x, weights)
    return y, (x, weights, mean, rstd)


def _layer_bwd(eps, features, wafer, residuals, dy):
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
    normal = x.astype(jnp.float32) * rstd[..., None]
    dnormal = dy * _rowwise(scale, x)
    along = fabric.all_reduce(jnp.sum(dnormal * normal, -1), COLS) / features
    dx = rstd[..., None] * (dnormal - normal * along[..., None])
    dscale = fabric.all_reduce(_over_rows(dy * normal), _row_axes(x))
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
    return _real(y, features).astype(x.dtype), mean, rstd


def _layer_gradients_per_pe(
    x: Float[Array, "*batch Tt Dt"],
    weights: tuple[Float[Array, " Dt"], ...],
    mean: Float[Array, "*batch Tt"],
    rstd: Float[Array, "*batch Tt"],
    dy: Float[Array, "*batch Tt Dt"],
    features: int,
) -> tuple[Float[Array, "*batch Tt Dt"], tuple[Float[Array, " Dt"], ...]]:
    dy = _real(dy.astype(jnp.float32), features)
    normal = _real((x.astype(jnp.float32) - mean[..., None]) * rstd[..., None], features)
    dnormal = dy * _rowwise(weights[0], x)
    sums = jnp.stack([jnp.sum(dnormal, -1), jnp.sum(dnormal * normal, -1)])
    along = (fabric.all_reduce(sums, COLS) / features)[..., None]
    dx = _real(rstd[..., None] * (dnormal - along[0] - normal * along[1]), features)
    partial = jnp.stack([_over_rows(g) for g in (dy * normal, dy)[: len(weights)]])
    dweights = fabric.all_reduce(partial, _row_axes(x))
    return dx.astype(x.dtype), tuple(
        g.astype(w.dtype) for g, w in zip(dweights, weights, strict=True)
    )


def _moments(x, features):
    """Mean and variance of every row, whose parts lie along x."""
    p, tile = fabric.axis_size(COLS), x.shape[-1]
    count = jnp.clip(features - fabric.axis_index(COLS) * tile, 0, tile).astype(jnp.float32)
    mean = jnp.sum(x, -1) / jnp.maximum(count, 1)
    m2 = jnp.sum(jnp.square(_real(x - mean[..., None], features)), -1)
    if 2 * p > tile:
        mean = fabric.all_reduce(count * mean, COLS) / features
        squares = jnp.sum(jnp.square(_real(x - mean[..., None], features)), -1)
        return mean, fabric.all_reduce(squares, COLS) / features
    means, m2s = fabric.all_gather(jnp.stack([mean, m2])[:, None], COLS, 1, replicated=True)
    counts = jnp.clip(features - tile * jnp.arange(p), 0, tile).astype(jnp.float32)
    counts = counts.reshape(p, *(1,) * mean.ndim)
    mean = jnp.sum(counts * means, 0) / features
    between = jnp.sum(counts * jnp.square(means - mean[None]), 0)
    return mean, (jnp.sum(m2s, 0) + between) / features


def _real(x, features):
    """`x` with zeros in the columns that are padding."""
    tile = x.shape[-1]
    if fabric.axis_size(COLS) * tile == features:
        return x
    column = fabric.axis_index(COLS) * tile + jnp.arange(tile)
    return jnp.where(_rowwise(column < features, x), x, 0)


def _rowwise(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _over_rows(x):
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def _row_axes(x):
    # A matrix is replicated over the wafers: each has all of its rows.
    return (WAFERS, ROWS) if x.ndim > 2 else ROWS


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, static_argnames=("eps", "features"), inline=True)
def _local_rms(x, scale, eps, features):
    x32 = x.astype(jnp.float32)
    mean = jnp.sum(x32 * x32, -1, keepdims=True) / features
    return (x32 * lax.rsqrt(mean + eps) * _rowwise(scale, x)).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("eps", "features"), inline=True)
def _local_layer(x, scale, bias, eps, features):
    x32 = x.astype(jnp.float32)[..., :features]
    mean = jnp.mean(x32, -1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
    y = (x32 - mean) * lax.rsqrt(variance + eps) * _rowwise(scale[:features], x)
    if bias is not None:
        y = y + _rowwise(bias[:features], x)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] - features)]
    return (jnp.pad(y, padding) if features < x.shape[-1] else y).astype(x.dtype)


def _check(what, x, scale, bias, eps, features):
    if x.ndim < 2:
        raise ValueError(
            f"{what}: x is {x.shape}, it must have two dimensions or more: [..., rows, features]"
        )
    D = x.shape[-1]
    for name, weight in (("scale", scale), ("bias", bias)):
        if weight is not None and weight.shape != (D,):
            raise ValueError(
                f"{what}: {name} is {weight.shape} and x is {x.shape}: it must be ({D},), one "
                "number a feature"
            )
    for name, array in (("x", x), ("scale", scale), ("bias", bias)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{what}: {name} is {array.dtype}; cast it to a floating dtype")
    if isinstance(eps, jax.core.Tracer) or not np.float32(eps) > 0:
        raise ValueError(f"{what}: eps={eps} must be a number above 0 in float32")
    if features is not None and not 1 <= features <= D:
        raise ValueError(
            f"{what}: features={features} and x is {x.shape}: it must be from 1 to {D}"
        )
