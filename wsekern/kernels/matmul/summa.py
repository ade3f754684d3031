"""This file is the matrix product by SUMMA: panels of both operands are broadcast, one at a time.

Public per-PE functions, of tiles on a grid of any height and width. R. A. van de Geijn and J.
Watts, "SUMMA: Scalable Universal Matrix Multiplication Algorithm", 1997. A panel is as wide as a
tile along the longer side of the grid; along the shorter it may lie in two tiles, and each PE then
sends its part of it: a flood of what each PE has of the panel.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from wsekern import fabric
from wsekern.kernels.matmul import panels, tile
from wsekern.wafer.axes import COLS, ROWS


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """S = X @ Y, in float32: in each step a panel of either is broadcast, and one product.

    There are max(height, width) steps; a PE holds one panel of each operand at a time.
    """
    width = min(a.shape[-1], b.shape[-2])

    def part(s):
        pair = _panel(a, -1, COLS, width, s), _panel(b, -2, ROWS, width, s)
        return tile.product("nn", *pair, len(shape))

    def step(c, s):
        return c + part(s), None

    return lax.scan(step, part(0), jnp.arange(1, _steps()))[0]


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """X = S @ Y^T, in float32: in each step a panel of Y is broadcast, and one of X summed."""
    width = min(shape[-1], b.shape[-2])

    def step(x, s):
        partial = tile.product("nt", a, _panel(b, -2, ROWS, width, s), len(shape))
        return _put(x, fabric.all_reduce(partial, COLS), -1, COLS, s), None

    return lax.scan(step, tile.zeros(shape, a, b), jnp.arange(_steps()))[0]


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape) -> jax.Array:
    """Y = X^T @ S, in float32: in each step a panel of X is broadcast, and one of Y summed."""
    width = min(a.shape[-1], shape[-2])

    def step(y, s):
        partial = tile.product("tn", _panel(a, -1, COLS, width, s), b, len(shape))
        return _put(y, fabric.all_reduce(partial, ROWS), -2, ROWS, s), None

    return lax.scan(step, tile.zeros(shape, a, b), jnp.arange(_steps()))[0]


def _steps() -> int:
    return max(fabric.axis_size(ROWS), fabric.axis_size(COLS))


def _panel(x: jax.Array, axis: int, along: str, width: int, s: Int[Array, ""] | int) -> jax.Array:
    start = s * width - fabric.axis_index(along) * x.shape[axis]
    return fabric.flood(panels.part(x, axis, start, width), along)


def _put(x: jax.Array, panel: jax.Array, axis: int, along: str, s: Int[Array, ""]) -> jax.Array:
    start = s * panel.shape[axis] - fabric.axis_index(along) * x.shape[axis]
    return panels.put(x, panel, axis, start)
