"""This file is the matrix product that several wafers share, each with a copy of both operands.

Public per-PE functions, of tiles. E. Solomonik and J. Demmel, "Communication-Optimal Parallel 2.5D
Matrix Multiplication and LU Factorization Algorithms", 2011: of c copies each does a c-th of the
steps, and the results are summed over the copies.
"""

from collections.abc import Callable

import jax
from jax import lax

from wsekern import fabric
from wsekern.kernels.matmul import shares, tile
from wsekern.wafer.axes import WAFERS


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable) -> jax.Array:
    """S = X @ Y, in float32: each wafer's share by `inner`, then one sum over the wafers."""
    wafers = fabric.axis_size(WAFERS)
    mine = _mine(shares.cut_columns(a, wafers)), _mine(shares.cut_rows(b, wafers))
    return fabric.all_reduce(inner(*mine, shape), WAFERS)


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable) -> jax.Array:
    """X = S @ Y^T, in float32: each wafer's share by `inner`, then one gather over the wafers."""
    wafers = fabric.axis_size(WAFERS)
    part = (*shape[:-1], shape[-1] // wafers)
    return shares.joined_columns(_all(inner(a, _mine(shares.cut_rows(b, wafers)), part)))


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, inner: Callable) -> jax.Array:
    """Y = X^T @ S, in float32: each wafer's share by `inner`, then one gather over the wafers."""
    wafers = fabric.axis_size(WAFERS)
    part = (*shape[:-2], shape[-2] // wafers, shape[-1])
    return shares.joined_rows(_all(inner(_mine(shares.cut_columns(a, wafers)), b, part)))


def _mine(shares: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(shares, fabric.axis_index(WAFERS), 0, keepdims=False)


def _all(share: jax.Array) -> jax.Array:
    return fabric.all_gather(share[None], WAFERS, 0, replicated=True)
