"""What a matrix product may end with: scales of integer weights, a bias and an activation.

On a wafer they are applied to the float32 sums of each PE's own tile, which are then rounded once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.wafer.limits import sum_dtype

Function = Callable[[jax.Array], jax.Array]
Activation = str | Function | None
ACTIVATIONS: dict[str, Function] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def apply_epilogue(
    sums: Float[Array, "*batch N"],
    bias: Float[Array, " N"] | None,
    scales: Float[Array, " N"] | None,
    activation: Function | None,
) -> tuple[Float[Array, "*batch N"], Float[Array, "*batch N"]]:
    """`activation(sums * scales + bias)`, and the argument that the activation was given."""
    if scales is not None:
        sums = sums * as_row(scales, sums)
    if bias is not None:
        sums = sums + as_row(bias, sums)
    return (sums if activation is None else activation(sums)), sums


def before_activation(
    dc: Float[Array, "..."], argument: Float[Array, "..."], activation: Function | None
) -> Float[Array, "..."]:
    """The gradient of the activation's argument, from that of its result; element by element."""
    if activation is None:
        return dc
    # Differentiated as it was applied, to sums that are wider than the operands.
    wide = argument.astype(sum_dtype(argument.dtype))
    (gradient,) = jax.vjp(activation, wide)[1](dc.astype(wide.dtype))
    # Zero stays zero, however steep the activation is there: in the padding a root's slope is
    # infinite, and 0 times that would be a NaN that the products spread over all rows.
    return jnp.where(dc == 0, 0, gradient).astype(dc.dtype)


def as_row(vector: Float[Array, " N"], like: Float[Array, "*batch N"]) -> Float[Array, "... N"]:
    """`vector` with as many dimensions as `like`, and its dtype."""
    return jnp.expand_dims(vector.astype(like.dtype), tuple(range(like.ndim - 1)))


def sum_over_rows(
    columns: Float[Array, "*batch N"], like: Float[Array, " N"], along: str | tuple[str, ...]
) -> Float[Array, " N"]:
    """The gradient of a vector that was added to, or multiplied by, every row of a product."""
    by_column = jnp.sum(columns, tuple(range(columns.ndim - 1)))
    return (fabric.all_reduce(by_column, along) if along else by_column).astype(like.dtype)


def find_activation(operation: str, activation: Activation) -> Function | None:
    """The activation of that name.

    Raises:
      ValueError: the name is unknown, or it is neither a name nor a function.
    """
    if activation is None or callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"{operation}: activation={activation!r} is not one of {known}, nor a function of an "
            "array"
        )
    return ACTIVATIONS[activation]
