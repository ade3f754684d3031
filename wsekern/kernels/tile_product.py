"""This file is the product of one PE's tiles: `a @ b` and the two products of its gradient.

Public per-PE functions. `a` is `[..., M, K]`; `b` is `[K, N]`, or has `a`'s leading dimensions. No
factor is transposed in memory, and sums are in float32 (float64 of float64) and stay so.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def product(a: Float[Array, "*batch M K"], b: Float[Array, "... K N"]) -> Float[Array, "... M N"]:
    """`a @ b`."""
    batch = _batch(b)
    return _dot(a, b, ((a.ndim - 1,), (b.ndim - 2,)), (batch, batch))


def left_gradient(
    dc: Float[Array, "*batch M N"], b: Float[Array, "... K N"]
) -> Float[Array, "... M K"]:
    """`dc @ b^T`: the gradient of `a`."""
    batch = _batch(b)
    return _dot(dc, b, ((dc.ndim - 1,), (b.ndim - 1,)), (batch, batch))


def right_gradient(
    a: Float[Array, "*batch M K"], dc: Float[Array, "*batch M N"], b_ndim: int
) -> Float[Array, "... K N"]:
    """`a^T @ dc`: the gradient of a `b` of `b_ndim` dimensions, summed over the others of `a`."""
    batch = tuple(range(b_ndim - 2))
    summed = tuple(range(b_ndim - 2, a.ndim - 1))
    return _dot(a, dc, (summed, summed), (batch, batch))


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What products of `dtype` are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


def _batch(b: jax.Array) -> tuple[int, ...]:
    return tuple(range(b.ndim - 2))


def _dot(left, right, contract, batch):
    return lax.dot_general(
        left, right, (contract, batch), preferred_element_type=sum_dtype(left.dtype)
    )
