"""This file is how tiles that move along lines of PEs cross the links between these.

A load is of the link that leaves a PE in a direction, in tiles.
"""

from __future__ import annotations

import numpy as np

from wsekern.wafer.axes import COLS, ROWS

UP = {ROWS: "S", COLS: "E"}  # the direction of higher places
DOWN = {ROWS: "N", COLS: "W"}
LinkLoads = dict[str, np.ndarray]  # by direction: [height, width], or 1 where all lines are alike


def upwards(
    start: np.ndarray, goal: np.ndarray, size: int, line: np.ndarray | int = 0, lines: int = 1
) -> np.ndarray:
    """How many tiles leave each place for the next higher one, `[lines, size]`.

    Args:
      start: where each tile is.
      goal: where it goes; those that go down are not counted.
      size: places of a line.
      line: on which line each tile is.
      lines: how many there are.
    """
    tiles = np.zeros((lines, size), np.int64)
    up = goal > start
    if up.any():
        at = np.broadcast_to(line, start.shape)[up]
        np.add.at(tiles, (at, start[up]), 1)
        np.add.at(tiles, (at, goal[up]), -1)
    return tiles.cumsum(1)


def downwards(
    start: np.ndarray, goal: np.ndarray, size: int, line: np.ndarray | int = 0, lines: int = 1
) -> np.ndarray:
    """How many leave each place for the next lower one; arguments as of `upwards`."""
    return upwards(size - 1 - start, size - 1 - goal, size, line, lines)[:, ::-1]


def along(axis: str, values: np.ndarray) -> np.ndarray:
    """Values by place along `axis`, the same on each of its lines."""
    return np.asarray(values, float).reshape((-1, 1) if axis == ROWS else (1, -1))
