"""This file is the product of one PE's tiles: `a @ b` and the two products of its gradient.

Public per-PE functions. `a` is `[..., M, K]`; `b` is `[K, N]`, or has `a`'s leading dimensions. No
factor is transposed in memory, and sums are in float32 (float64 of float64) and stay so.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wsekern import context, fabric
from wsekern.axes import COLS, ROWS, WAFERS


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
    return _dot(*runnable(a, dc), (summed, summed), (batch, batch))


def runnable(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of a product that is summed over the rows of both, as the backend at hand can run it.

    XLA's for the CPU, in jax 0.10, refuses some such products of 16 bits: there they are widened.
    """
    wafer = context.inside()
    if wafer is None or wafer.platform != "cpu":
        return a, b
    return a.astype(sum_dtype(a.dtype)), b.astype(sum_dtype(b.dtype))


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """What products of `dtype` are summed in."""
    return jnp.promote_types(dtype, jnp.float32)


def zeros(shape: tuple[int, ...], a: jax.Array) -> jax.Array:
    """A sum of products of `a` to begin with, that differs from PE to PE as `a` does."""
    along = (WAFERS, ROWS, COLS) if a.ndim > 2 else (ROWS, COLS)
    return fabric.varying(jnp.zeros(shape, sum_dtype(a.dtype)), along)


def _batch(b: jax.Array) -> tuple[int, ...]:
    return tuple(range(b.ndim - 2))


def _dot(left, right, contract, batch):
    return lax.dot_general(
        left, right, (contract, batch), preferred_element_type=sum_dtype(left.dtype)
    )
