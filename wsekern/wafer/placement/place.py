"""`Placement`: on which physical PE each PE of a program lies, and how far apart neighbors are.

Each row of the program is one physical row. Its faulty PEs are passed over, and PEs in reserve make
up for them. Leaving out whole rows would not do: with 1 % of the PEs faulty, one row in 100,000 has
no fault.

Spread the reserve evenly over a row, and each column of the program has an ideal place in it.
Column x goes to the first good PE at or east of its ideal place. So a fault moves only the PEs near
it, and the columns of neighboring rows are a few places apart at most.

    physical row 0   . . . . .    program columns at 0 1 2 3
    physical row 1   . X . . .    program columns at 0 2 3 4   (X is faulty)

A row uses a window of the wafer's columns: from the narrowest that has enough good PEs up to the
whole wafer. The window with the shortest lines is taken. If not all rows of the program can lie
side by side, physical rows with too few good PEs are skipped.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from wsekern.hardware import Machine
from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.frozen_array import FrozenArray

# Widths of the window that are tried: shares of the columns that the narrowest one leaves free.
_WINDOWS = (0.0, 0.1, 0.25, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The physical row and column of each PE of a program; immutable, equal by value."""

    held_rows: FrozenArray
    held_columns: FrozenArray
    physical: tuple[int, int]  # rows and columns of the physical wafer, turned as the program lies
    faulty: int  # how many of its PEs are faulty

    @property
    def rows(self) -> Int[np.ndarray, "height width"]:
        """[height, width], the physical row of each PE; read-only."""
        return self.held_rows.array

    @property
    def columns(self) -> Int[np.ndarray, "height width"]:
        """[height, width], the physical column of each PE; read-only."""
        return self.held_columns.array

    def region(self, y: int, x: int, height: int, width: int) -> "Placement":
        """The placement of a sub-rectangle of the program, which begins at row y and column x."""
        part = slice(y, y + height), slice(x, x + width)
        return dataclasses.replace(
            self,
            held_rows=FrozenArray(self.rows[part]),
            held_columns=FrozenArray(self.columns[part]),
        )

    def hops(self, axis: str) -> Int[np.ndarray, "lines gaps"]:
        """Hops between neighbors along `axis`, "y" or "x"; one fewer than the PEs there."""
        along = 0 if axis == "y" else 1
        return np.abs(np.diff(self.rows, axis=along)) + np.abs(np.diff(self.columns, axis=along))

    @property
    def longest(self) -> dict[str, int]:
        """The longest distance between neighbors along each axis, in hops."""
        return {axis: int(self.hops(axis).max(initial=1)) for axis in ("y", "x")}

    @functools.cached_property
    def stretch(self) -> dict[str, float]:
        """Hops of the longest line along each axis, over the hops of a line without faults."""
        stretch = {}
        for dim, axis in enumerate(("y", "x")):
            hops = self.hops(axis)
            stretch[axis] = float(hops.sum(dim).max() / hops.shape[dim]) if hops.size else 1.0
        return stretch

    def __repr__(self) -> str:
        (height, width), (rows, columns) = self.rows.shape, self.physical
        return f"<Placement of {height}x{width} on {rows}x{columns}, {self.faulty:,} faulty>"


def check_fits(name: str, machine: Machine, height: int, width: int) -> None:
    """Raises ValueError if a grid is larger than what programs can use of `machine`."""
    long, short = max(height, width), min(height, width)
    usable = (machine.usable_height, machine.usable_width)
    if long > max(usable) or short > min(usable):
        raise ValueError(
            f"{name}: {height}x{width} PEs do not fit {machine.name}, whose programs can use "
            f"{usable[0]}x{usable[1]}, either way round"
        )


def place_on(
    machine: Machine, height: int, width: int, defects: Defects | None, folded: bool
) -> Placement | None:
    """Where the PEs of a grid lie on `machine`; None if they lie side by side, as by default.

    Raises:
      ValueError: the map of defects is larger than the wafer, or leaves no such rectangle.
    """
    if defects is None and not folded:
        return None
    defects = Defects.random(machine, 1.0) if defects is None else defects
    made = machine.physical
    if defects.shape[0] > made[0] or defects.shape[1] > made[1]:
        raise ValueError(
            f"defects: a map of {defects.shape[0]}x{defects.shape[1]} PEs is larger than "
            f"{machine.name}, which has {made[0]}x{made[1]}, spare columns included"
        )
    return place(defects, height, width, folded)


@functools.lru_cache(maxsize=16)
def place(defects: Defects, height: int, width: int, folded: bool = False) -> Placement:
    """Where the `height * width` PEs of a program lie on a wafer with `defects`.

    A program that is higher than the wafer is turned: its columns are then physical rows.

    Args:
      defects: of the physical wafer.
      height: rows of the program.
      width: its columns.
      folded: whether both axes are folded. Neighbors in a ring, the two ends too, are then at most
        two places apart; neighbors on a line are two places apart as well.

    Raises:
      ValueError: no such rectangle is left; the message gives the largest one.
    """
    if (height > defects.shape[0] or width > defects.shape[1]) and height > width:
        columns, rows = _places(defects, width, height)
        rows, columns = rows.T, columns.T
        physical = defects.shape[::-1]
    else:
        rows, columns = _places(defects, height, width)
        physical = defects.shape
    if folded:
        order = np.ix_(_fold(height), _fold(width))
        rows, columns = rows[order], columns[order]
    frozen_rows, frozen_columns = (FrozenArray(p.astype(np.int32)) for p in (rows, columns))
    return Placement(frozen_rows, frozen_columns, physical, defects.count)


def largest(defects: Defects, height: int | None = None) -> tuple[int, int]:
    """The largest (height, width) that `place` can place; of those with `height` rows if given."""
    widths = np.sort((~defects.faulty).sum(1))[::-1]  # good PEs of each row, most first
    areas = widths * np.arange(1, len(widths) + 1)
    rows = int(areas.argmax()) + 1 if height is None else height
    return rows, int(widths[rows - 1]) if rows <= len(widths) else 0


def _places(
    defects: Defects, height: int, width: int
) -> tuple[Int[np.ndarray, "height width"], Int[np.ndarray, "height width"]]:
    """The physical row and column of each PE, with rows of the program along physical rows."""
    good = ~defects.faulty
    rows, narrowest = _rows(defects, good, height, width)
    spare = good.shape[1] - narrowest
    windows = sorted({narrowest + round(spare * share) for share in _WINDOWS})
    if not defects.count:
        windows = windows[:1]
    candidates = [_columns(good[rows, :window], width) for window in windows]
    columns = min(candidates, key=_extra_hops)
    return np.broadcast_to(rows[:, None], columns.shape), columns


def _rows(
    defects: Defects, good: Bool[np.ndarray, "rows columns"], height: int, width: int
) -> tuple[Int[np.ndarray, " height"], int]:
    """Which physical rows are used, and the narrowest window in which each has its PEs."""
    enough = good.sum(1) >= width
    if enough.sum() < height:
        raise ValueError(_no_room(defects, height, width))
    # Side by side if possible: a skipped row makes a hop of two for every column.
    rows = np.arange(height) if enough[:height].all() else np.flatnonzero(enough)[:height]
    reach = (good[rows].cumsum(1) < width).sum(1) + 1
    return rows, int(reach.max())


def _no_room(defects: Defects, height: int, width: int) -> str:
    rows, columns = defects.shape
    best, best_of_height = largest(defects), largest(defects, height)
    offer = f"the largest rectangle that does is {best[0]}x{best[1]}" if best[1] else "none works"
    if best[1] and best_of_height[1] and best_of_height != best:
        offer += f", and {height} rows have {best_of_height[1]} columns at most"
    return (
        f"defects: {height}x{width} PEs do not fit a wafer of {rows}x{columns}, "
        f"{defects.count:,} of them faulty: {offer}"
    )


def _columns(
    good: Bool[np.ndarray, "height window"], width: int
) -> Int[np.ndarray, "height width"]:
    """The physical columns of rows that have at least `width` good PEs each.

    With good = [[1, 0, 1, 1, 1]] and width 4, the good places are 0 2 3 4 and the ideal ones 0 1 2
    3. West of these stand 0 1 1 2 good PEs: never more than the columns placed by then. So none is
    passed over, and the columns are 0 2 3 4.
    """
    window = good.shape[1]
    places = np.argsort(~good, axis=1, kind="stable")  # the good ones first, in order
    ideal = np.arange(width) * window // width
    before = np.concatenate([np.zeros((len(good), 1), np.int64), good.cumsum(1)], 1)[:, ideal]
    # How many good PEs each row has passed over at each column. It must not fall, or a PE would be
    # used twice; and it must leave enough good PEs for the columns still to come.
    passed = np.maximum.accumulate(before - np.arange(width), axis=1)
    passed = np.clip(passed, 0, good.sum(1, keepdims=True) - width)
    return np.take_along_axis(places, np.arange(width) + passed, 1)


def _extra_hops(columns: Int[np.ndarray, "height width"]) -> int:
    """Hops of the longest row and of the longest column beyond those of a grid without faults."""
    across = int((columns[:, -1] - columns[:, 0]).max()) - columns.shape[1]
    aside = np.abs(np.diff(columns, axis=0)).sum(0)
    return across + int(aside.max(initial=0))


def _fold(size: int) -> Int[np.ndarray, " size"]:
    """The place on the line of each place in the ring: 0 2 4 5 3 1 of six."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)[::-1]])
