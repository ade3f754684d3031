"""Arithmetic on pytrees of fields, with inner products summed in float32 or more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Fields = Any  # a field, or a pytree of fields
Operator = Callable[[Fields], Fields]
Scalar = Float[Array, ""]


def dot(a: Fields, b: Fields) -> Scalar:
    """The inner product over all fields."""
    # Sums of whole arrays, which XLA splits over the devices as the fields are split.
    parts = [
        jnp.sum(jnp.multiply(x.astype(sum_dtype(x)), y.astype(sum_dtype(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(parts[1:], parts[0])


def norm(a: Fields) -> Scalar:
    """The root of the sum of squares over all fields."""
    return jnp.sqrt(dot(a, a))


def plus(a: Fields, scale: Scalar | float, b: Fields) -> Fields:
    """`a + scale * b`, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y.astype(x.dtype), a, b)


def minus(a: Fields, b: Fields) -> Fields:
    """`a - b`."""
    return jax.tree.map(jnp.subtract, a, b)


def sum_dtype(x: Any) -> Any:
    """The dtype in which products of `x` are summed."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check(method: str, operator: Operator, b: Fields, x0: Fields | None) -> None:
    """Raises ValueError where b, x0 and operator(b) differ in structure, shape or dtype."""
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise ValueError(f"{method}: b holds no field")
    # A solution is not an integer field, and a step would be rounded to nothing.
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{method}: b is {leaf.dtype}; cast it to a floating dtype")
    for name, other in (("x0", x0), ("operator(b)", jax.eval_shape(operator, b))):
        if other is None:
            continue
        trees = [str(jax.tree.structure(fields)) for fields in (other, b)]
        if trees[0] != trees[1]:
            raise ValueError(f"{method}: {name} is {trees[0]}, b is {trees[1]}")
        for leaf, of_b in zip(jax.tree.leaves(other), leaves, strict=True):
            if leaf.shape != of_b.shape or leaf.dtype != of_b.dtype:
                raise ValueError(
                    f"{method}: {name} is {leaf.dtype}{list(leaf.shape)}, it must be as b, "
                    f"{of_b.dtype}{list(of_b.shape)}"
                )
