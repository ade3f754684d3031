"""This file is what a move of tiles takes on a placement: hops, and tiles across the busiest link.

Routes are dimension-ordered over physical PEs: along x, then along y. Where columns of neighboring
rows stand apart, a move along y goes sideways first, and shares those links with its neighbors'.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.placement.place import Placement


class Routes(NamedTuple):
    """Of one move, over all PEs."""

    longest: int  # hops of the farthest tile
    mean: float  # hops of a tile
    loads: dict[str, int]  # tiles across the busiest link of each direction


@functools.lru_cache(maxsize=256)
def routes(
    placement: Placement, axes: tuple[str, ...], pairs: tuple[tuple[int, int], ...]
) -> Routes:
    """What `pairs` of (source, destination) take, on every line along `axes`.

    Args:
      placement: of the program's PEs.
      axes: one or both of "y" and "x"; of both, places count in their order, the first outermost.
      pairs: places along `axes`.
    """
    row, column = (_by_line(m, axes) for m in (placement.rows, placement.columns))
    source, to = np.array(pairs, np.int64).reshape(-1, 2).T
    from_row, from_column = row[:, source].ravel(), column[:, source].ravel()
    to_row, to_column = row[:, to].ravel(), column[:, to].ravel()
    hops = np.abs(to_row - from_row) + np.abs(to_column - from_column)
    loads = {}
    height, width = placement.physical
    for direction, line, start, goal, lines, places in (
        ("E", from_row, from_column, to_column, height, width),
        ("W", from_row, width - 1 - from_column, width - 1 - to_column, height, width),
        ("S", to_column, from_row, to_row, width, height),
        ("N", to_column, height - 1 - from_row, height - 1 - to_row, width, height),
    ):
        crossing = _busiest(line, start, goal, lines, places)
        if crossing:
            loads[direction] = crossing
    return Routes(int(hops.max(initial=0)), float(hops.mean()), loads)


@functools.lru_cache(maxsize=64)
def sideways(placement: Placement, axis: str) -> dict[str, int]:
    """Tiles across the busiest link each way, where every PE sends to its next along `axis`."""
    size = placement.rows.shape[0 if axis == ROWS else 1]
    forth = routes(placement, (axis,), tuple((i, i + 1) for i in range(size - 1))).loads
    back = routes(placement, (axis,), tuple((i + 1, i) for i in range(size - 1))).loads
    return {d: max(forth.get(d, 0), back.get(d, 0)) for d in {*forth, *back}}


def _by_line(of_pe: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    """[lines, places along `axes`]."""
    if axes == (ROWS,):
        return of_pe.T
    if axes == (COLS,):
        return of_pe
    return (of_pe if axes == (ROWS, COLS) else of_pe.T).reshape(1, -1)


def _busiest(line: np.ndarray, start: np.ndarray, goal: np.ndarray, lines: int, places: int) -> int:
    """How many tiles cross the busiest link toward higher places, over all lines."""
    up = goal > start
    if not up.any():
        return 0
    base, size = line[up] * (places + 1), lines * (places + 1)
    begun = np.bincount(base + start[up], minlength=size)
    ended = np.bincount(base + goal[up], minlength=size)
    return int((begun - ended).reshape(lines, -1).cumsum(1).max())
