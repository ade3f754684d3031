"""Arithmetic on pytrees of fields, with inner products summed in float32 or more.

A square overflows or vanishes where the number itself is far from either: in float32 outside 1e-19
to 1e19. So what is squared is first multiplied by a power of two, which rounds nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Fields = Any  # a field, or a pytree of fields
Operator = Callable[[Fields], Fields]
Scalar = Float[Array, ""]
Power = Int[Array, ""]  # of two


def dot(a: Fields, b: Fields) -> Scalar:
    """The inner product over all fields."""
    # Sums of whole arrays, which XLA splits over the devices as the fields are split.
    parts = [
        jnp.sum(jnp.multiply(x.astype(sum_dtype(x)), y.astype(sum_dtype(y))))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(parts[1:], parts[0])


def norm(a: Fields) -> Scalar:
    """The root of the sum of squares over all fields, whose squares must be in range."""
    return jnp.sqrt(dot(a, a))


def mean_size(a: Fields) -> Scalar:
    """The root of the mean square over all fields: of any numbers, as they are."""
    power = exponent(a)
    return times_power(norm(times_power(a, -power)) / math.sqrt(cells(a)), power)


def largest(a: Fields) -> Scalar:
    """The largest absolute value of all fields."""
    return functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x)).astype(sum_dtype(x)) for x in jax.tree.leaves(a)]
    )


def cells(a: Fields) -> int:
    """How many numbers all fields have."""
    return sum(leaf.size for leaf in jax.tree.leaves(a))


def exponent(a: Fields) -> Power:
    """The power of two above the largest number of all fields; 0 if that is 0 or not finite."""
    most = largest(a)
    return jnp.where(jnp.isfinite(most), jnp.frexp(most)[1], 0)


def times_power(a: Fields, power: Power) -> Fields:
    """`a * 2**power`, in the dtypes of `a`: exact where the result is in their range."""

    # In two steps: the power itself may leave the range where the result does not.
    def scale(x: Float[Array, "..."]) -> Float[Array, "..."]:
        one = jnp.ones((), sum_dtype(x))
        halves = jnp.ldexp(one, power // 2), jnp.ldexp(one, power - power // 2)
        return (x.astype(one.dtype) * halves[0] * halves[1]).astype(x.dtype)

    return jax.tree.map(scale, a)


def plus(a: Fields, scale: Scalar | float, b: Fields) -> Fields:
    """`a + scale * b`, in the dtypes of `a`."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(scale, x.dtype) * y.astype(x.dtype), a, b)


def times(a: Fields, scale: Scalar) -> Fields:
    """`a * scale`, in the dtypes of `a`; one product a cell, for loops."""
    return jax.tree.map(lambda x: (x.astype(scale.dtype) * scale).astype(x.dtype), a)


def unit_factor(size: Scalar) -> Scalar:
    """The power of two that brings `size` near 1, as a factor; 1 if it is 0 or not finite."""
    return jnp.ldexp(jnp.ones_like(size), jnp.clip(-exponent(size), -125, 125))


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
