"""A line of PEs: an axis of the grid, or the snake that winds through the whole grid."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from wsekern.fabric import moves


class Line(NamedTuple):
    """A line as a reduction sees it."""

    size: int
    place: Int[Array, ""]  # of this PE
    # (tile, by, fill): the tile `by` places before this PE, or `fill` beyond an end.
    shift: Callable[[Shaped[Array, "..."], int, float], Shaped[Array, "..."]]
    axis: str | None  # the axis that it lies along; None for the snake


def along(axis: str) -> Line:
    """The line along an axis of the grid."""

    def shift(tile: Shaped[Array, "..."], by: int, fill: float) -> Shaped[Array, "..."]:
        return moves.shift(tile, axis, by, periodic=False, fill=fill)

    return Line(moves.axis_size(axis), moves.axis_index(axis), shift, axis)


def snake(rows: str, cols: str) -> Line:
    """The line through all PEs: the first row eastward, the next one westward, and so on.

    It can be shifted by one place. That takes three moves at once, east, west, and down or up at
    the edges; each PE keeps what one of them brings.

        0 1 2
        5 4 3
        6 7 8
    """
    width = moves.axis_size(cols)
    y, x = moves.axis_index(rows), moves.axis_index(cols)
    eastward = y % 2 == 0
    place = y * width + jnp.where(eastward, x, width - 1 - x)
    first, last = place % width == 0, place % width == width - 1  # of its row

    def shift(tile: Shaped[Array, "..."], by: int, fill: float) -> Shaped[Array, "..."]:
        if abs(by) != 1:
            raise ValueError(f"fabric: a snake moves one place at a time, not {by}")
        turns = first if by == 1 else last
        east = moves.shift(tile, cols, 1, periodic=False, fill=fill)
        west = moves.shift(tile, cols, -1, periodic=False, fill=fill)
        turned = moves.shift(tile, rows, by, periodic=False, fill=fill)
        on_row = jnp.where(eastward == (by == 1), east, west)
        return jnp.where(turns, turned, on_row)

    return Line(moves.axis_size(rows) * width, place, shift, None)
