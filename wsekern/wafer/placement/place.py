"""This file is `Placement`: on which physical PE each PE of a program lies, and how far hops are.

Each row of the program is one physical row, whose faulty PEs are passed over for those in reserve.
Leaving out whole rows would not do: with 1 % of the PEs faulty, one row in 100,000 has none.

Column x of a row goes to the first good PE at or east of where it would stand if the PEs in reserve
were spread evenly over the row; so a fault moves only what stands near it, and the columns of
neighboring rows are a few places apart at most. How wide the row's window is, from the narrowest
that serves to the whole wafer, is chosen for the shortest lines. Rows with too few good PEs are
skipped where all rows of the program cannot lie side by side.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.frozen_array import Held

_WINDOWS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of what the wafer has beyond the narrowest window


@dataclasses.dataclass(frozen=True)
class Placement:
    """The physical row and column of each PE of a program; immutable, equal by value."""

    held_rows: Held
    held_columns: Held
    physical: tuple[int, int]  # rows and columns of PEs on the wafer, as the program lies on it
    faulty: int  # of these

    @property
    def rows(self) -> np.ndarray:
        """[height, width], the physical row of each PE; read-only."""
        return self.held_rows.array

    @property
    def columns(self) -> np.ndarray:
        """[height, width], the physical column of each PE; read-only."""
        return self.held_columns.array

    def region(self, y: int, x: int, height: int, width: int) -> Placement:
        """The part of a sub-rectangle of the program."""
        part = slice(y, y + height), slice(x, x + width)
        held = Held(self.rows[part]), Held(self.columns[part])
        return dataclasses.replace(self, held_rows=held[0], held_columns=held[1])

    def hops(self, axis: str) -> np.ndarray:
        """Hops between neighbors along `axis`, "y" or "x": one less of them than PEs there."""
        along = 0 if axis == "y" else 1
        return np.abs(np.diff(self.rows, axis=along)) + np.abs(np.diff(self.columns, axis=along))

    @property
    def longest(self) -> dict[str, int]:
        """The longest hop between neighbors along each axis."""
        return {axis: int(self.hops(axis).max(initial=1)) for axis in ("y", "x")}

    @functools.cached_property
    def stretch(self) -> dict[str, float]:
        """Hops of the longest line along each axis, PE after PE, over what they would be."""
        found = {}
        for dim, axis in enumerate(("y", "x")):
            hops = self.hops(axis)
            found[axis] = float(hops.sum(dim).max() / hops.shape[dim]) if hops.size else 1.0
        return found

    def __repr__(self) -> str:
        (height, width), (rows, columns) = self.rows.shape, self.physical
        return f"<Placement of {height}x{width} on {rows}x{columns}, {self.faulty:,} faulty>"


@functools.lru_cache(maxsize=16)
def place(defects: Defects, height: int, width: int, folded: bool = False) -> Placement:
    """Where the `height * width` PEs of a program lie on a wafer with `defects`.

    A program that is higher than the wafer lies on it turned: its columns are physical rows.

    Args:
      defects: of the physical wafer.
      height: rows of the program.
      width: its columns.
      folded: whether both axes are folded, so that neighbors in a ring, its two ends too, are two
        places apart at most; neighbors on a line are two apart then.

    Raises:
      ValueError: no such rectangle is left; says the largest that is.
    """
    if (height > defects.shape[0] or width > defects.shape[1]) and height > width:
        columns, rows = _maps(defects, width, height)
        rows, columns = rows.T, columns.T
        physical = defects.shape[::-1]
    else:
        rows, columns = _maps(defects, height, width)
        physical = defects.shape
    if folded:
        order = np.ix_(_fold(height), _fold(width))
        rows, columns = rows[order], columns[order]
    held = [Held(places.astype(np.int32)) for places in (rows, columns)]
    return Placement(held[0], held[1], physical, defects.count)


def largest(defects: Defects, height: int | None = None) -> tuple[int, int]:
    """The largest rectangle left, by this file's way: of all, or of those of `height` rows."""
    good = np.sort((~defects.faulty).sum(1))[::-1]  # the widths of rows, the widest first
    areas = good * np.arange(1, len(good) + 1)
    rows = int(areas.argmax()) + 1 if height is None else height
    return rows, int(good[rows - 1]) if rows <= len(good) else 0


def _maps(defects: Defects, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    good = ~defects.faulty
    rows, narrowest = _rows(defects, good, height, width)
    spare = good.shape[1] - narrowest
    windows = sorted({narrowest + round(spare * share) for share in _WINDOWS})
    if not defects.count:
        windows = windows[:1]
    found = [_columns(good[rows, :window], width) for window in windows]
    columns = min(found, key=_length)
    return np.broadcast_to(rows[:, None], columns.shape), columns


def _rows(defects: Defects, good: np.ndarray, height: int, width: int) -> tuple[np.ndarray, int]:
    """Which physical rows are taken, and the narrowest window in which each has its PEs."""
    enough = good.sum(1) >= width
    if enough.sum() < height:
        raise ValueError(_no_room(defects, height, width))
    rows = np.arange(height) if enough[:height].all() else np.flatnonzero(enough)[:height]
    reach = (good[rows].cumsum(1) < width).sum(1) + 1
    return rows, int(reach.max())


def _no_room(defects: Defects, height: int, width: int) -> str:
    rows, columns = defects.shape
    most, same = largest(defects), largest(defects, height)
    left = f"the largest rectangle that does is {most[0]}x{most[1]}" if most[1] else "none works"
    if most[1] and same[1] and same != most:
        left += f", and {height} rows have {same[1]} columns at most"
    return (
        f"defects: {height}x{width} PEs do not fit a wafer of {rows}x{columns}, "
        f"{defects.count:,} of them faulty: {left}"
    )


def _columns(good: np.ndarray, width: int) -> np.ndarray:
    """[rows, width], the physical columns of rows that have at least `width` good PEs each."""
    window = good.shape[1]
    places = np.argsort(~good, axis=1, kind="stable")  # the good ones first, in order
    target = np.arange(width) * window // width
    before = np.concatenate([np.zeros((len(good), 1), np.int64), good.cumsum(1)], 1)[:, target]
    # How many good PEs each row has passed over: never fewer than before, and never so many that
    # too few are left for the columns still to come.
    passed = np.maximum.accumulate(before - np.arange(width), axis=1)
    passed = np.clip(passed, 0, good.sum(1, keepdims=True) - width)
    return np.take_along_axis(places, np.arange(width) + passed, 1)


def _length(columns: np.ndarray) -> int:
    """What the longest row and the longest column have in hops beyond their PEs."""
    across = int((columns[:, -1] - columns[:, 0]).max()) - columns.shape[1]
    aside = np.abs(np.diff(columns, axis=0)).sum(0)
    return across + int(aside.max(initial=0))


def _fold(size: int) -> np.ndarray:
    """The place on the line of each place in the ring: 0 2 4 5 3 1."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)[::-1]])
