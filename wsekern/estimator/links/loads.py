"""This file is what the links of each PE carry, from the moves of a walk.

All PEs run one program, so what they compute and hold is the same on each; what their links carry
is not. A shift that comes back along its line, a flood and a reduction load some links more than
others. Routes go along x, then y. A load is of the link that leaves a PE in a direction.

Where a trace does not say where a flood starts, floods are taken to start on all PEs of their lines
in turn, as those of SUMMA do. A change of layout is taken as even traffic between all pairs of PEs.
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
    """Which links a move crosses; the words of equal patterns are counted together."""

    kind: str  # "shift", "flood", "gather", "scatter", "exchange", "relayout", or an algorithm
    axes: tuple[str, ...] = (ROWS, COLS)  # outermost first, as PEs are numbered
    # Of a reduction; None: every PE has the result. Of a flood; None: one PE after another.
    root: int | None = None
    words: float = 0.0  # of the tile, where the tree of a reduction depends on it
    pairs: bytes = b""  # of a shift, a digest
    # Of a shift, in tiles.
    crossed: LinkLoads = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def rooted(self, places: Mapping[str, int], sizes: Mapping[str, int]) -> LinkPattern:
        """The pattern of a flood that starts at `places` of its axes; as it is, if they differ."""
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
    """The most tiles that cross a link, by direction along each axis, and the pattern.

    Args:
      axes: that the PEs are numbered along, row-major.
      sizes: PEs along each axis.
      source: who sends.
      to: who receives.
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
        # Where its route turns, a tile has moved along the axes before already.
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
      words: of a tile, summed over the moves of each pattern.
      sizes: PEs along each axis.
    """
    sums: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}  # lines that are alike stay one
    for pattern, n in words:
        for direction, tiles in pattern_loads(pattern, sizes).items():
            key = direction, tiles.shape
            sums[key] = sums.get(key, 0.0) + n * tiles
    found = {d: np.zeros((sizes[ROWS], sizes[COLS])) for d in "NESW"}
    for (direction, _), load in sums.items():
        found[direction] += load
    return found


def pattern_loads(pattern: LinkPattern, sizes: Mapping[str, int]) -> LinkLoads:
    """The load of the links, in tiles; a direction that nothing takes may be missing."""
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
    """What all PEs alike send, along each of `axes` in turn.

    A flood from each PE, averaged; all tiles to all; parts of tiles, summed on their way; a part of
    each tile to each; and as the last, but 1 in the middle, where the walk prices it.
    """
    loads: LinkLoads = {}
    pes, done = math.prod(sizes[a] for a in axes), 1  # of all axes, and of those before
    for axis in axes:
        size = sizes[axis]
        below = np.arange(1.0, size + 1)  # PEs from which a link may carry a word, to those above
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
    here = [*axes, *(a for a in AXES if a not in axes)]
    whole = tiles.reshape(*tiles.shape, *([1] * (len(here) - len(axes))))
    return whole.transpose([here.index(a) for a in AXES]).max(0).astype(np.float32)
