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
from jax import lax
from jaxtyping import Array, Bool, Float, Int

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
    power = exponent_of_any(a)
    unit = times_power_exactly(a, -power)
    return times_power(norm(unit) / math.sqrt(cells(a)), power)


def largest(a: Fields) -> Scalar:
    """The largest absolute value of all fields; subnormal numbers may count as 0."""
    return functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x)).astype(sum_dtype(x)) for x in jax.tree.leaves(a)]
    )


def cells(a: Fields) -> int:
    """How many numbers all fields have."""
    return sum(leaf.size for leaf in jax.tree.leaves(a))


def exponent(a: Fields) -> Power:
    """The power of two above the largest number of all fields; 0 if that is 0 or not finite.

    A subnormal number may count as 0.
    """
    most = largest(a)
    return jnp.where(jnp.isfinite(most) & (most > 0), jnp.frexp(most)[1], 0)


def exponent_of_any(a: Fields) -> Power:
    """The same, of subnormal numbers too."""
    # If all numbers are subnormal, only larger multiples of them can be measured.
    most, lift = largest(a), 64
    lifted = exponent(times_power_exactly(a, jnp.int32(lift)))
    return jnp.where(most == 0, jnp.where(lifted == 0, 0, lifted - lift), exponent(a))


def times_power(a: Fields, power: Power) -> Fields:
    """`a * 2**power`, in the dtypes of `a`: exact where both are normal numbers."""

    def scale(x: Float[Array, "..."]) -> Float[Array, "..."]:
        return _times_halves(x.astype(sum_dtype(x)), power).astype(x.dtype)

    return jax.tree.map(scale, a)


def times_power_exactly(a: Fields, power: Power) -> Fields:
    """The same, of subnormal numbers too."""

    def scale(x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(sum_dtype(x))
        info = jnp.finfo(wide.dtype)
        smallest = info.minexp - info.nmant
        # Processors may read subnormal numbers as 0, but not the integers that they stand for.
        count, is_subnormal = _count_of_smallest(wide)
        scaled = _times_halves(wide, power), _times_halves(count, power + smallest)
        return jnp.where(is_subnormal, scaled[1], scaled[0]).astype(x.dtype)

    return jax.tree.map(scale, a)


def _times_halves(x: Float[Array, "..."], power: Power) -> Float[Array, "..."]:
    # In two steps: the power itself may leave the range where the result does not.
    info = jnp.finfo(x.dtype)
    for half in (power // 2, power - power // 2):
        x = x * jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(half, info.minexp, info.maxexp - 1))
    return x


def _count_of_smallest(
    x: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Subnormal numbers as multiples of the smallest one; and where `x` is subnormal, or 0."""
    bits = lax.bitcast_convert_type(x, f"int{8 * x.dtype.itemsize}")
    magnitude = bits & jnp.iinfo(bits.dtype).max
    count = magnitude.astype(x.dtype)
    return jnp.where(bits < 0, -count, count), magnitude < 2 ** jnp.finfo(x.dtype).nmant


def plus(a: Fields, scale: Scalar | float, b: Fields) -> Fields:
    """`a + scale * b`, computed in float32 or more, in the dtypes of `a`."""

    def add(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = sum_dtype(x)
        return (x.astype(wide) + jnp.asarray(scale, wide) * y.astype(wide)).astype(x.dtype)

    return jax.tree.map(add, a, b)


def times(a: Fields, scale: Scalar) -> Fields:
    """`a * scale`, in the dtypes of `a`; one product a cell, for loops."""

    def multiply(x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = sum_dtype(x)
        return (x.astype(wide) * scale.astype(wide)).astype(x.dtype)

    return jax.tree.map(multiply, a)


def minus(a: Fields, b: Fields) -> Fields:
    """`a - b`."""
    return jax.tree.map(jnp.subtract, a, b)


def sum_dtype(x: Any) -> Any:
    """The dtype in which products of `x` are summed."""
    return jnp.promote_types(x.dtype, jnp.float32)


def check(
    method: str, operator: Operator, b: Fields, x0: Fields | None, preconditioner: Operator | None
) -> None:
    """Raises ValueError where x0, or what a function makes of b, is not as b."""
    if not callable(operator):
        raise ValueError(
            f"{method}: operator is a {type(operator).__name__}; it must be a function of fields, "
            "for a matrix A lambda x: A @ x"
        )
    if x0 is not None:
        _check_like(method, "x0", x0, b)
    for name, function in (("operator", operator), ("preconditioner", preconditioner)):
        if function is not None:
            _check_like(method, f"{name}(b)", jax.eval_shape(function, b), b)


def check_right_side(method: str, b: Fields) -> None:
    """Raises ValueError where b is not made of fields of floats."""
    leaves = jax.tree.leaves(b)
    if not leaves:
        raise ValueError(f"{method}: b holds no field")
    for leaf in leaves:
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{method}: b holds {leaf!r}, which is no array; make b one with jax.numpy.asarray"
            )
        if leaf.size == 0:
            raise ValueError(
                f"{method}: b holds a field of shape {list(leaf.shape)}, which has no cells"
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"{method}: b is {leaf.dtype}; solve for a pair of real fields, its real and its "
                "imaginary part"
            )
        # A solution is not an integer field, and a step would be rounded to nothing.
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"{method}: b is {leaf.dtype}; cast it to a floating dtype")


def _check_like(method: str, name: str, other: Fields, b: Fields) -> None:
    trees = [str(jax.tree.structure(fields)) for fields in (other, b)]
    if trees[0] != trees[1]:
        raise ValueError(f"{method}: {name} is {trees[0]}, b is {trees[1]}")
    for leaf, of_b in zip(jax.tree.leaves(other), jax.tree.leaves(b), strict=True):
        if leaf.shape != of_b.shape or leaf.dtype != of_b.dtype:
            raise ValueError(
                f"{method}: {name} is {leaf.dtype}{list(leaf.shape)}, it must be as b, "
                f"{of_b.dtype}{list(of_b.shape)}"
            )
