"""This file is the matrix product by SUMMA: panels of both operands are broadcast, one at a time.

Public per-PE functions, of tiles on a grid of any height and width. R. A. van de Geijn and J.
Watts, "SUMMA: Scalable Universal Matrix Multiplication Algorithm", 1997. A panel is as wide as a
tile along the longer side of the grid; along the shorter it may lie in two tiles, and each PE then
sends its part of it.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from wsekern import fabric
from wsekern.axes import COLS, ROWS
from wsekern.kernels import tile_product as tile


def forward(
    a: Float[Array, "*batch Mt Kt"], b: Float[Array, "... Kb Nt"]
) -> Float[Array, "*batch Mt Nt"]:
    """This PE's tile of `a @ b`, in float32: in each step two broadcasts and one product.

    There are max(height, width) steps; a PE holds one panel of each operand at a time.
    """

    def step(c, s):
        return c + tile.product(_panel_of_a(a, b, s), _panel_of_b(a, b, s)), None

    c = tile.zeros((*a.shape[:-1], b.shape[-1]), a)
    return lax.scan(step, c, _steps())[0]


def backward(
    a: Float[Array, "*batch Mt Kt"],
    b: Float[Array, "... Kb Nt"],
    dc: Float[Array, "*batch Mt Nt"],
) -> tuple[Float[Array, "*batch Mt Kt"], Float[Array, "... Kb Nt"]]:
    """This PE's tiles of `dc @ b^T` and `a^T @ dc`, in float32.

    In each step a panel of either operand is broadcast and a panel of either gradient summed.
    """
    width = _width(a, b)

    def step(carry, s):
        da, db = carry
        panel = fabric.all_reduce(tile.left_gradient(dc, _panel_of_b(a, b, s)), COLS)
        da = _put(da, panel, -1, s * width - fabric.axis_index(COLS) * a.shape[-1])
        panel = fabric.all_reduce(tile.right_gradient(_panel_of_a(a, b, s), dc, b.ndim), ROWS)
        db = _put(db, panel, -2, s * width - fabric.axis_index(ROWS) * b.shape[-2])
        return (da, db), None

    return lax.scan(step, (tile.zeros(a.shape, a), tile.zeros(b.shape, a)), _steps())[0]


def _steps() -> Int[Array, " steps"]:
    return jnp.arange(max(fabric.axis_size(ROWS), fabric.axis_size(COLS)))


def _width(a: jax.Array, b: jax.Array) -> int:
    return min(a.shape[-1], b.shape[-2])


def _panel_of_a(a, b, s):
    start = s * _width(a, b) - fabric.axis_index(COLS) * a.shape[-1]
    return fabric.all_reduce(_part(a, -1, start, _width(a, b)), COLS)


def _panel_of_b(a, b, s):
    start = s * _width(a, b) - fabric.axis_index(ROWS) * b.shape[-2]
    return fabric.all_reduce(_part(b, -2, start, _width(a, b)), ROWS)


def _part(x: jax.Array, axis: int, start: Int[Array, ""], width: int) -> jax.Array:
    """Places `start` to `start + width` of the tile; zeros where it has no such place."""
    length = x.shape[axis]
    at = jnp.clip(start, 0, length - width)
    part = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    if length % width:
        part = jnp.roll(part, at - start, axis)
    places = start + _along(part, axis)
    return jnp.where((places >= 0) & (places < length), part, jnp.zeros((), x.dtype))


def _put(x: jax.Array, panel: jax.Array, axis: int, start: Int[Array, ""]) -> jax.Array:
    """The tile with `panel` from place `start` on, as far as it has such places."""
    length, width = x.shape[axis], panel.shape[axis]
    at = jnp.clip(start, 0, length - width)
    if length % width:
        panel = jnp.roll(panel, start - at, axis)
    old = lax.dynamic_slice_in_dim(x, at, width, axis % x.ndim)
    places = at - start + _along(panel, axis)
    new = jnp.where((places >= 0) & (places < width), panel, old)
    return lax.dynamic_update_slice_in_dim(x, new, at, axis % x.ndim)


def _along(x: jax.Array, axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
