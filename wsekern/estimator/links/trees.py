"""The links that a reduction loads: its tree's edges, laid along lines of PEs, cross them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from wsekern.estimator.links.crossings import DOWN, UP, LinkLoads, along, downwards, upwards
from wsekern.fabric.moves import ring_order
from wsekern.fabric.reductions import chain, choice, k_tree, optimal, two_phase
from wsekern.wafer.axes import COLS, ROWS


def reduction_loads(
    algorithm: str, root: int | None, words: float, axes: Sequence[str], sizes: Mapping[str, int]
) -> LinkLoads:
    """The load of each link in a reduction, in tiles.

    The tree first runs along the last axis, on all lines. The sums meet in one line of the axis
    before it, and the tree runs along that line alone. If every PE needs the result, it is flooded
    back, along x in the root's row and then along y.

    Args:
      algorithm: one of `wsekern.fabric.reductions.choice`.
      root: the number of the PE that gets the result, row-major; None: all PEs do.
      words: words of a tile.
      axes: the axes of the grid, outermost first.
      sizes: PEs along each axis.
    """
    total = _no_loads(sizes)
    # A ring already leaves the result everywhere.
    if algorithm == "ring":
        for axis in axes:
            _add(total, axis, *_ring_loads(sizes[axis]), {})
        return total
    lengths = [sizes[a] for a in axes]
    top = choice.root_of(algorithm, lengths) if root is None else root
    places = dict(zip(axes, choice.places_of(top, lengths), strict=True))
    if algorithm == "snake":
        _add_snake(total, choice.snake_place(list(places.values()), lengths))
    else:
        met: dict[str, int] = {}  # the axes that are summed already, and where the sums are
        for axis in reversed(axes):
            child, parent = _edges(algorithm, sizes[axis], words, places[axis]).T
            up, down = (f(child, parent, sizes[axis])[0] for f in (upwards, downwards))
            _add(total, axis, up, down, met)
            met[axis] = places[axis]
    if root is None:
        for direction, load in flood_loads(places, sizes).items():
            total[direction] += load
    return total


def flood_loads(places: Mapping[str, int], sizes: Mapping[str, int]) -> LinkLoads:
    """The load of each link in a flood from `places`, which has the axes that it goes along."""
    total = _no_loads(sizes)
    for axis, place in places.items():
        at, last = np.arange(sizes[axis]), sizes[axis] - 1
        up, down = (at >= place) & (at < last), (at <= place) & (at > 0)
        # Along x in the root's row only: from there every column is flooded.
        row = {ROWS: places[ROWS]} if axis == COLS and ROWS in places else {}
        _add(total, axis, up, down, row)
    return total


def _no_loads(sizes: Mapping[str, int]) -> LinkLoads:
    return {d: np.zeros((sizes[ROWS], sizes[COLS])) for d in "NESW"}


def _add(
    total: LinkLoads, axis: str, up: np.ndarray, down: np.ndarray, only: Mapping[str, int]
) -> None:
    """Adds loads along `axis`: on every line, or on the one line at `only` of the other axis."""
    (at,) = [slice(only[a], only[a] + 1) if a in only else slice(None)
             for a in (ROWS, COLS) if a != axis]  # fmt: skip
    lines = (at, slice(None)) if axis == COLS else (slice(None), at)
    total[UP[axis]][lines] += along(axis, up)
    total[DOWN[axis]][lines] += along(axis, down)


def _edges(algorithm: str, size: int, words: float, root: int) -> np.ndarray:
    """(child, parent) of each message along a line, `[edges, 2]`, as `wsekern/fabric` sends it."""
    place = np.arange(size)
    if algorithm == "star":
        return np.stack([place, np.full(size, root)], 1)
    if algorithm == "optimal":
        return np.array([pair for pairs in optimal.rounds(size, words, root) for pair in pairs])
    if algorithm == "tree":
        # In round k, the PEs send whose distance from the root has bit k as its lowest. Distances
        # 1 2 3 4 5 6 7 send over 1 2 1 4 1 2 1 places, toward the root.
        far = np.abs(place - root)
        return np.stack([place, place - np.sign(place - root) * (far & -far)], 1)
    if algorithm == "chain":
        levels: tuple[chain.Chains, ...] = (chain.Chains(np.full(size, root), 1),)
    else:
        levels = {"two_phase": two_phase.phases, "k_tree": k_tree.levels}[algorithm](size, root)
    # On each level, a PE with a head sends one stride toward it, unless it is the head itself.
    edges = []
    for head, stride in levels:
        sends = (head >= 0) & (head != place)
        edges.append(np.stack([place, place + np.sign(head - place) * stride], 1)[sends])
    return np.concatenate(edges)


def _ring_loads(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles on each link, up and down, of a reduce-scatter on the folded ring and an all-gather.

    In the reduce-scatter each PE sends all parts but one to its neighbor on the ring. In the
    all-gather a link carries upwards the parts of all PEs below it. A part is 1 / size of a tile.
    """
    order, at = np.array(ring_order(size, "folded")), np.arange(size)
    to = np.roll(order, -1)
    up, down = (f(order, to, size)[0] * (size - 1) for f in (upwards, downwards))
    up = up + np.where(at < size - 1, at + 1, 0)
    return up / size, (down + np.where(at > 0, size - at, 0)) / size


def _add_snake(total: LinkLoads, root: int) -> None:
    """Adds one tile on each link of the chain that winds through the rows, toward its root.

    Even rows run east and odd ones west, and each ends under or above the next. Of 2 rows of 3:

      0 > 1 > 2
              v
      5 < 4 < 3      places along the snake, with the links of a chain from 0 to its root 5
    """
    height, width = total["E"].shape
    y, x = np.indices((height, width))
    place = y * width + np.where(y % 2 == 0, x, width - 1 - x)
    for toward, sends in ((-1, place > root), (1, place < root)):
        turns = place % width == (0 if toward == -1 else width - 1)
        east = (y % 2 == 0) == (toward == 1)
        total["S" if toward == 1 else "N"] += sends & turns
        total["E"] += sends & ~turns & east
        total["W"] += sends & ~turns & ~east
