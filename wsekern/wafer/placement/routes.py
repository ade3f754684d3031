"""What a move of tiles costs on a placement: its hops, and the tiles across the busiest link.

Routes are dimension-ordered over physical PEs: along x, then along y. If the columns of neighboring
rows stand apart, a move along y goes sideways first, on links that its neighbors' moves use too.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.placement.place import Placement


class Routes(NamedTuple):
    """The routes of one move, over all PEs."""

    longest: int  # hops of the farthest tile
    mean: float  # hops of a tile
    loads: dict[str, int]  # tiles across the busiest link of each direction: N, E, S, W


@functools.lru_cache(maxsize=256)
def routes(
    placement: Placement, axes: tuple[str, ...], pairs: tuple[tuple[int, int], ...]
) -> Routes:
    """The routes of `pairs` of (source, destination), made on every line along `axes` at once.

    Args:
      placement: of the program's PEs.
      axes: "y", "x" or both; with both, places are numbered with the first axis outermost.
      pairs: places along `axes`.
    """
    row, column = (_by_line(m, axes) for m in (placement.rows, placement.columns))
    source, to = np.array(pairs, np.int64).reshape(-1, 2).T
    from_row, from_column = row[:, source].ravel(), column[:, source].ravel()
    to_row, to_column = row[:, to].ravel(), column[:, to].ravel()
    hops = np.abs(to_row - from_row) + np.abs(to_column - from_column)
    loads = {}
    height, width = placement.physical
    # Along x a tile is still in its sender's row; along y it is in its receiver's column already.
    # West and north are east and south with places counted from the other end.
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
    """Tiles across the busiest link of each direction when every PE sends to its next on `axis`."""
    size = placement.rows.shape[0 if axis == ROWS else 1]
    forth = routes(placement, (axis,), tuple((i, i + 1) for i in range(size - 1))).loads
    back = routes(placement, (axis,), tuple((i + 1, i) for i in range(size - 1))).loads
    return {d: max(forth.get(d, 0), back.get(d, 0)) for d in {*forth, *back}}


def _by_line(
    places: Int[np.ndarray, "height width"], axes: tuple[str, ...]
) -> Int[np.ndarray, "lines pes"]:
    """`places` as one row for each line along `axes`."""
    if axes == (ROWS,):
        return places.T
    if axes == (COLS,):
        return places
    return (places if axes == (ROWS, COLS) else places.T).reshape(1, -1)


def _busiest(
    line: Int[np.ndarray, " tiles"],
    start: Int[np.ndarray, " tiles"],
    goal: Int[np.ndarray, " tiles"],
    lines: int,
    places: int,
) -> int:
    """How many tiles cross the busiest link in the direction of rising places, over all lines."""
    rising = goal > start
    if not rising.any():
        return 0
    # On one line: tiles that have begun by place i, less those that have ended by then, cross the
    # link from i to i + 1. One bin more a line keeps the lines apart in the flat count.
    base, size = line[rising] * (places + 1), lines * (places + 1)
    begun = np.bincount(base + start[rising], minlength=size)
    ended = np.bincount(base + goal[rising], minlength=size)
    return int((begun - ended).reshape(lines, -1).cumsum(1).max())
