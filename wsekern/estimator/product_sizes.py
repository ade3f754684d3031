"""The sizes of the matrix products that products, convolutions and ragged products are."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


class ProductSizes(NamedTuple):
    """B products of M x K and K x N; of complex matrices, of their real and imaginary parts."""

    B: int
    M: int
    K: int
    N: int


def product_sizes(equation: JaxprEqn) -> ProductSizes:
    """The sizes of an equation that is one of `PRODUCTS`."""
    avals: list[Any] = [v.aval for v in (*equation.invars[:2], equation.outvars[0])]
    a, b, out = avals
    params = equation.params
    if equation.primitive.name == "dot_general":
        (over_a, _), (batch, _) = params["dimension_numbers"]
        B, K = (math.prod(a.shape[d] for d in dims) for dims in (batch, over_a))
        M, N = (math.prod(x.shape) // max(1, B * K) for x in (a, b))
    elif equation.primitive.name == "ragged_dot_general":
        B, M, K, N = _ragged_sizes(equation)
    else:
        # Every output channel is a weighted sum of what lies under the filter: a product of
        # [places, channels x filter] and [channels x filter, output channels], for each group.
        channels = b.shape[params["dimension_numbers"].rhs_spec[0]]
        B = params["feature_group_count"] * params["batch_group_count"]
        K, N = math.prod(b.shape) // max(1, channels), channels // B
        M = math.prod(out.shape) // max(1, channels)
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        K, N = 2 * K, 2 * N
    return ProductSizes(B, M, K, N)


def _ragged_sizes(equation: JaxprEqn) -> ProductSizes:
    """Sizes of groups of rows, each with a matrix of its own; all groups of the mean length.

    [M, K] by [G, K, N] to [M, N]   G products of M / G rows
    [K, M] by [K, N] to [G, M, N]   G products over K / G rows, as in the gradient of the matrices
    """
    avals: list[Any] = [v.aval for v in (*equation.invars, equation.outvars[0])]
    a, _, groups, out = (aval.shape for aval in avals)
    numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    K = math.prod(a[d] for d in numbers[0][0])
    G, M = groups[-1], math.prod(a) // max(1, K)
    if len(out) > 2:
        return ProductSizes(G, M, -(-K // G), math.prod(out) // max(1, G * M))
    return ProductSizes(G, -(-M // G), K, math.prod(out) // max(1, M))
