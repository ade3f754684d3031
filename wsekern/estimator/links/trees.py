"""This file is which links a reduction loads: those that its tree's edges cross, line by line."""

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
    """The load of each link, in tiles.

    A tree is along the last axis on all lines, and then along the one before it where these have
    met. What every PE needs is flooded back, along x in the root's row and along y from there.

    Args:
      algorithm: of `wsekern.fabric.reductions.choice`.
      root: the number of the PE that gets the result, row-major; None: all PEs do.
      words: of a tile.
      axes: of the grid, outermost first.
      sizes: PEs along each axis.
    """
    found: LinkLoads = {d: np.zeros((sizes[ROWS], sizes[COLS])) for d in "NESW"}
    if algorithm == "ring":
        for axis in axes:
            _add(found, axis, *_ring(sizes[axis]), {})
        return found
    lengths = [sizes[a] for a in axes]
    top = choice.root_of(algorithm, lengths) if root is None else root
    places = dict(zip(axes, choice.places_of(top, lengths), strict=True))
    if algorithm == "snake":
        _snake(found, choice.snake_place(list(places.values()), lengths))
    else:
        met: dict[str, int] = {}
        for axis in reversed(axes):
            child, parent = _edges(algorithm, sizes[axis], words, places[axis]).T
            up, down = (f(child, parent, sizes[axis])[0] for f in (upwards, downwards))
            _add(found, axis, up, down, met)
            met[axis] = places[axis]
    if root is None:
        for direction, load in flood_loads(places, sizes).items():
            found[direction] += load
    return found


def flood_loads(places: Mapping[str, int], sizes: Mapping[str, int]) -> LinkLoads:
    """The load of each link in a flood from `places`, of the axes that it goes along."""
    found: LinkLoads = {d: np.zeros((sizes[ROWS], sizes[COLS])) for d in "NESW"}
    for axis, place in places.items():
        here, last = np.arange(sizes[axis]), sizes[axis] - 1
        up, down = (here >= place) & (here < last), (here <= place) & (here > 0)
        row = {ROWS: places[ROWS]} if axis == COLS and ROWS in places else {}
        _add(found, axis, up, down, row)
    return found


def _add(
    found: LinkLoads, axis: str, up: np.ndarray, down: np.ndarray, only: Mapping[str, int]
) -> None:
    """Adds loads along `axis`: on every line, or on that at the place `only` of the other axis."""
    (at,) = [slice(only[a], only[a] + 1) if a in only else slice(None)
             for a in (ROWS, COLS) if a != axis]  # fmt: skip
    where = (at, slice(None)) if axis == COLS else (slice(None), at)
    found[UP[axis]][where] += along(axis, up)
    found[DOWN[axis]][where] += along(axis, down)


def _edges(algorithm: str, size: int, words: float, root: int) -> np.ndarray:
    """(child, parent) of all that is sent along a line, `[edges, 2]`; see `wsekern/fabric/`."""
    place = np.arange(size)
    if algorithm == "star":
        return np.stack([place, np.full(size, root)], 1)
    if algorithm == "optimal":
        return np.array([pair for pairs in optimal.rounds(size, words, root) for pair in pairs])
    if algorithm == "tree":
        far = np.abs(place - root)
        return np.stack([place, place - np.sign(place - root) * (far & -far)], 1)
    if algorithm == "chain":
        levels: tuple[chain.Chains, ...] = (chain.Chains(np.full(size, root), 1),)
    else:
        levels = {"two_phase": two_phase.phases, "k_tree": k_tree.levels}[algorithm](size, root)
    sent = []
    for head, stride in levels:
        sends = (head >= 0) & (head != place)
        sent.append(np.stack([place, place + np.sign(head - place) * stride], 1)[sends])
    return np.concatenate(sent)


def _ring(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of a tile: on round the folded ring, all but one of them, then gathered by all."""
    order, here = np.array(ring_order(size, "folded")), np.arange(size)
    to = np.roll(order, -1)
    up, down = (f(order, to, size)[0] * (size - 1) for f in (upwards, downwards))
    up = up + np.where(here < size - 1, here + 1, 0)
    return up / size, (down + np.where(here > 0, size - here, 0)) / size


def _snake(found: LinkLoads, root: int) -> None:
    """One tile on each link of the chain that winds through the rows, toward its root."""
    height, width = found["E"].shape
    y, x = np.indices((height, width))
    place = y * width + np.where(y % 2 == 0, x, width - 1 - x)
    for toward, sends in ((-1, place > root), (1, place < root)):
        turns = place % width == (0 if toward == -1 else width - 1)
        east = (y % 2 == 0) == (toward == 1)
        found["S" if toward == 1 else "N"] += sends & turns
        found["E"] += sends & ~turns & east
        found["W"] += sends & ~turns & ~east
