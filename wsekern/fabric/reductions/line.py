"""This file is a line of PEs, each of which has a place and two neighbors at most.

An axis of the grid is one; the snake through the whole grid, which turns at the edges, is another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wsekern.fabric import moves


class Line(NamedTuple):
    """What an algorithm needs to know of a line."""

    size: int
    place: jax.Array  # of this PE, int32
    # A tile, how many places it moves (toward higher ones if positive), and what enters at an end.
    shift: Callable[[jax.Array, int, Any], jax.Array]
    axis: str | None  # the axis that it lies along; None for the snake


def along(axis: str) -> Line:
    """The line along an axis of the grid."""

    def shift(tile, by, fill):
        return moves.shift(tile, axis, by, periodic=False, fill=fill)

    return Line(moves.axis_size(axis), moves.axis_index(axis), shift, axis)


def snake(rows: str, cols: str) -> Line:
    """The line through all PEs: the first row eastwards, the next one westwards, and so on.

    It is shifted one place at a time, by three moves side by side: on a row, back on the next, and
    down at the edges. A PE takes one of them.
    """
    width = moves.axis_size(cols)
    y, x = moves.axis_index(rows), moves.axis_index(cols)
    eastwards = y % 2 == 0
    place = y * width + jnp.where(eastwards, x, width - 1 - x)
    first, last = place % width == 0, place % width == width - 1  # of its row

    def shift(tile, by, fill):
        if abs(by) != 1:
            raise ValueError(f"fabric: a snake moves one place at a time, not {by}")
        turns = first if by == 1 else last
        east = moves.shift(tile, cols, 1, periodic=False, fill=fill)
        west = moves.shift(tile, cols, -1, periodic=False, fill=fill)
        turned = moves.shift(tile, rows, by, periodic=False, fill=fill)
        on_row = jnp.where(eastwards == (by == 1), east, west)
        return jnp.where(turns, turned, on_row)

    return Line(moves.axis_size(rows) * width, place, shift, None)
