"""This file is what a product may end with: scales of integer weights, a bias and an activation.

On a wafer it is applied to the float32 sums of each PE's own tile, and rounded once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Activation = str | Callable[[jax.Array], jax.Array] | None
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def applied(
    sums: jax.Array,
    bias: jax.Array | None,
    scales: jax.Array | None,
    activation: Callable | None,
) -> tuple[jax.Array, jax.Array]:
    """`activation(sums * scales + bias)`, and what the activation was taken of."""
    if scales is not None:
        sums = sums * along_last(scales, sums)
    if bias is not None:
        sums = sums + along_last(bias, sums)
    return (sums if activation is None else activation(sums)), sums


def along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector` as a row of `like`, in its dtype."""
    return jnp.expand_dims(vector.astype(like.dtype), tuple(range(like.ndim - 1)))


def function(what: str, activation: Activation) -> Callable | None:
    """The activation of a name.

    Raises:
      ValueError: the name is unknown, or it is neither a name nor a function.
    """
    if activation is None or callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"{what}: activation={activation!r} is not one of {known}, nor a function of an array"
        )
    return ACTIVATIONS[activation]


def check(what: str, a, b, N: int, bias, scales) -> None:
    """Raises ValueError where dtypes or the sizes of bias and scales do not fit `a @ b`."""
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"{what}: a is {a.dtype}; cast it to a floating dtype")
    if b.dtype == jnp.int8 and scales is None:
        raise ValueError(
            f"{what}: b is int8 and scales is None; give the scale of each of its {N} output "
            "channels, scales=[N]"
        )
    if scales is not None and b.dtype != jnp.int8:
        raise ValueError(f"{what}: scales are for int8 weights, b is {b.dtype}; leave them out")
    if scales is None and a.dtype != b.dtype:
        raise ValueError(f"{what}: a is {a.dtype} and b is {b.dtype}: cast one of them first")
    for name, vector in (("bias", bias), ("scales", scales)):
        if vector is None:
            continue
        if vector.shape != (N,):
            raise ValueError(
                f"{what}: {name} is {vector.shape}, it must be ({N},): one for each column of the "
                "result"
            )
        if not jnp.issubdtype(vector.dtype, jnp.floating):
            raise ValueError(f"{what}: {name} is {vector.dtype}; cast it to a floating dtype")
