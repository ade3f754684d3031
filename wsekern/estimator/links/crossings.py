"""How tiles that move along lines of PEs cross the links between them.

A load belongs to the link that leaves a PE in a direction, and counts tiles.
"""

from __future__ import annotations

import numpy as np

from wsekern.wafer.axes import COLS, ROWS

UP = {ROWS: "S", COLS: "E"}  # the direction of higher places along each axis
DOWN = {ROWS: "N", COLS: "W"}
# By direction: [height, width], or 1 in place of either where all lines are the same.
LinkLoads = dict[str, np.ndarray]


def upwards(
    start: np.ndarray, goal: np.ndarray, size: int, line: np.ndarray | int = 0, lines: int = 1
) -> np.ndarray:
    """How many tiles leave each place for the next higher one, `[lines, size]`.

    A tile counts 1 where it starts and -1 where it arrives; sums along the line give the tiles on
    each link. For tiles that go from 0 to 3 and from 1 to 2 on a line of 5:

      ends   1  1 -1 -1  0
      links  1  2  1  0  0

    Args:
      start: the place of each tile.
      goal: where it goes; tiles that go down are not counted.
      size: places of a line.
      line: the line of each tile.
      lines: how many lines there are.
    """
    ends = np.zeros((lines, size), np.int64)
    up = goal > start
    if up.any():
        at = np.broadcast_to(line, start.shape)[up]
        # Several tiles may start at one place: `ends[...] += 1` would count these once.
        np.add.at(ends, (at, start[up]), 1)
        np.add.at(ends, (at, goal[up]), -1)
    return ends.cumsum(1)


def downwards(
    start: np.ndarray, goal: np.ndarray, size: int, line: np.ndarray | int = 0, lines: int = 1
) -> np.ndarray:
    """How many tiles leave each place for the next lower one; arguments as of `upwards`."""
    return upwards(size - 1 - start, size - 1 - goal, size, line, lines)[:, ::-1]


def along(axis: str, values: np.ndarray) -> np.ndarray:
    """Values by place along `axis`, shaped so that they hold for each of its lines."""
    return np.asarray(values, float).reshape((-1, 1) if axis == ROWS else (1, -1))
