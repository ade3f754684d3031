"""This file is arithmetic on pytrees of fields, with inner products summed in float32 or more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Fields = Any  # a field, or a pytree of fields
Operator = Callable[[Fields], Fields]


def dot(a: Fields, b: Fields) -> jax.Array:
    """The inner product over all fields."""
    parts = [
        jnp.sum(jnp.multiply(x.astype(sum_dtype(x)), y.astype(sum_dtype(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(parts[1:], parts[0])


def norm(a: Fields) -> jax.Array:
    """The root of the sum of squares."""
    return jnp.sqrt(dot(a, a))


def plus(a: Fields, scale: jax.Array | float, b: Fields) -> Fields:
    """`a + scale * b`, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y.astype(x.dtype), a, b)


def minus(a: Fields, b: Fields) -> Fields:
    """`a - b`."""
    return jax.tree.map(jnp.subtract, a, b)


def sum_dtype(x: Any) -> Any:
    """What products of `x` are summed in."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check(what: str, operator: Operator, b: Fields, x: Fields | None) -> None:
    """Raises ValueError where `operator` does not make of a field what `b` is."""
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise ValueError(f"{what}: b holds no field")
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{what}: b is {leaf.dtype}; cast it to a floating dtype")
    for name, other in (("x0", x), ("operator(b)", jax.eval_shape(operator, b))):
        if other is None:
            continue
        trees = [str(jax.tree.structure(fields)) for fields in (other, b)]
        if trees[0] != trees[1]:
            raise ValueError(f"{what}: {name} is {trees[0]}, b is {trees[1]}")
        for mine, its in zip(jax.tree.leaves(other), leaves, strict=True):
            if mine.shape != its.shape or mine.dtype != its.dtype:
                raise ValueError(
                    f"{what}: {name} is {mine.dtype}{list(mine.shape)}, it must be as b, "
                    f"{its.dtype}{list(its.shape)}"
                )
