"""The words that each link of a wafer carries, from the moves of a walk.

All PEs run the same program, so that they compute and hold the same; their links do not carry the
same. A shift that comes back along its line, a flood and a reduction load some links more than
others. Routes go along x, then y. A load belongs to the link that leaves a PE in a direction.

Where a trace does not say on which PE a flood starts, floods are assumed to start on all PEs of
their lines in turn, as SUMMA's do. A relayout is assumed to be even traffic between all pairs of
PEs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from wsekern.estimator.links import trees
from wsekern.estimator.links.crossings import DOWN, UP, LinkLoads, along, downwards, upwards
from wsekern.fabric.reductions import choice
from wsekern.wafer.axes import AXES, COLS, ROWS, WAFERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinkPattern:
    """Which links a move crosses; words of moves with equal patterns are counted together."""

    # "shift", "flood", "gather", "scatter", "exchange", "relayout", or a reduction's algorithm.
    kind: str
    axes: tuple[str, ...] = (ROWS, COLS)  # outermost first, as PEs are numbered
    # The PE that a flood starts from, or that gets a reduction's result. None: a flood from one PE
    # after another, or a result for every PE.
    root: int | None = None
    words: float = 0.0  # words of a reduction's tile, where its tree depends on them
    pairs: bytes = b""  # a digest of a shift's (source, target) pairs, which may be a million
    # Tiles on each link in a shift. They follow from `pairs`, so that equality leaves them out.
    crossed: LinkLoads = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def with_root(self, places: Mapping[str, int], sizes: Mapping[str, int]) -> LinkPattern:
        """The pattern of a flood that starts at `places` of its axes.

        The pattern as it is, if `places` lacks an axis or lies outside of the grid.
        """
        grid = [a for a in self.axes if sizes[a] > 1]
        if any(not 0 <= places.get(a, -1) < sizes[a] for a in grid):
            return self
        root = 0
        for axis in self.axes:
            root = root * sizes[axis] + places.get(axis, 0)
        return dataclasses.replace(self, root=root)


def permutation_loads(
    axes: Sequence[str], sizes: Mapping[str, int], source: np.ndarray, to: np.ndarray
) -> tuple[list[tuple[str, int]], LinkPattern]:
    """The most tiles on a link in each direction, and the pattern of the whole permutation.

    A tile goes along x first. From (0, 0) to (1, 2), it leaves (0, 0) and (0, 1) eastward, then
    (0, 2) southward: the links of column 2, not of column 0.

    Args:
      axes: the axes along which PEs are numbered, row-major.
      sizes: PEs along each axis.
      source: the number of each PE that sends.
      to: the number of the PE that receives its tile.
    """
    place, goal = (
        dict(zip(axes, np.unravel_index(pes, [sizes[a] for a in axes]), strict=True))
        for pes in (source, to)
    )
    most: list[tuple[str, int]] = []
    crossed: LinkLoads = {}
    for axis in sorted(axes, key=(COLS, ROWS, WAFERS).index):
        others = [a for a in axes if a != axis]
        shape = [sizes[a] for a in others]
        # A tile's line along this axis is where the axes before have brought it, since `place` is
        # updated below as the tile turns.
        line = np.ravel_multi_index([place[a] for a in others], shape) if others else 0
        for names, crossing in ((UP, upwards), (DOWN, downwards)):
            tiles = crossing(place[axis], goal[axis], sizes[axis], line, math.prod(shape))
            if not tiles.any():
                continue
            most.append((names.get(axis, "wafer"), int(tiles.max())))
            if axis in names:
                tiles = tiles.reshape(*shape, sizes[axis])
                crossed[names[axis]] = _on_grid(tiles, [*others, axis])
        place[axis] = goal[axis]
    digest = hashlib.blake2b(source.tobytes() + to.tobytes(), digest_size=16).digest()
    return most, LinkPattern(kind="shift", axes=tuple(axes), pairs=digest, crossed=crossed)


def total_loads(words: Iterable[tuple[LinkPattern, float]], sizes: Mapping[str, int]) -> LinkLoads:
    """The words that leave each PE in each direction, `[height, width]`.

    Args:
      words: words of a tile, summed over the moves of each pattern.
      sizes: PEs along each axis.
    """
    # Loads that are the same on each line are summed as one line, [1, width] or [height, 1], and
    # spread over the wafer once at the end: a full wafer has 900,000 PEs, a program 100 patterns.
    sums: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    for pattern, n in words:
        for direction, tiles in pattern_loads(pattern, sizes).items():
            key = direction, tiles.shape
            sums[key] = sums.get(key, 0.0) + n * tiles
    whole = {d: np.zeros((sizes[ROWS], sizes[COLS])) for d in "NESW"}
    for (direction, _), load in sums.items():
        whole[direction] += load
    return whole


def pattern_loads(pattern: LinkPattern, sizes: Mapping[str, int]) -> LinkLoads:
    """The load of each link, in tiles; a direction without any may be missing."""
    if pattern.kind == "shift":
        return pattern.crossed
    grid = [a for a in pattern.axes if a != WAFERS and sizes[a] > 1]
    if pattern.kind == "flood" and pattern.root is not None:
        every = choice.places_of(pattern.root, [sizes[a] for a in pattern.axes])
        places = dict(zip(pattern.axes, every, strict=True))
        return trees.flood_loads({a: places[a] for a in grid}, sizes)
    if pattern.kind in ("flood", "gather", "scatter", "exchange", "relayout"):
        return _spread(pattern.kind, sorted(grid, key=(COLS, ROWS).index), sizes)
    return (
        trees.reduction_loads(pattern.kind, pattern.root, pattern.words, grid, sizes)
        if grid
        else {}
    )


def _spread(kind: str, axes: Sequence[str], sizes: Mapping[str, int]) -> LinkLoads:
    """The load of moves in which all PEs do the same, along each of `axes` in turn.

    On a line of 4, the links that go up have 1, 2, 3 PEs below them and 3, 2, 1 above. In tiles:

      flood     1/4 2/4 3/4   from one of the 4, averaged: from each PE below a quarter of the times
      gather    1   2   3     every tile from below
      scatter   3/4 2/4 1/4   summed on the way: one part of a tile for each PE above
      exchange  3/4 4/4 3/4   a part of a tile from each PE below to each PE above
      relayout  3/4 1   3/4   as an exchange, scaled to 1 in the middle, where it is priced
    """
    loads: LinkLoads = {}
    # After a gather along the first axis, each PE has the tiles of a whole line to send on.
    pes, done = math.prod(sizes[a] for a in axes), 1
    for axis in axes:
        size = sizes[axis]
        below = np.arange(1.0, size + 1)
        above = size - below
        up = {
            "flood": below * (above > 0) * done / pes,
            "gather": below * (above > 0) * done,
            "scatter": above / (size * done),
            "exchange": below * above / size,
            "relayout": below * above * 4 / size**2,
        }[kind]
        loads[UP[axis]], loads[DOWN[axis]] = along(axis, up), along(axis, up[::-1])
        done *= size
    return loads


def _on_grid(tiles: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Tiles by their places along `axes`, as [height, width]; the most of all wafers."""
    order = [*axes, *(a for a in AXES if a not in axes)]
    whole = tiles.reshape(*tiles.shape, *([1] * (len(order) - len(axes))))
    return whole.transpose([order.index(a) for a in AXES]).max(0).astype(np.float32)
