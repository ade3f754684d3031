"""The algorithms of reductions, their predicted cost, and the choice of "auto".

On devices "auto" is XLA's own collective. On a wafer it is the algorithm with the fewest cycles by
the model of `cost`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from wsekern.fabric import flood
from wsekern.fabric.reductions import chain, k_tree, optimal, ring, star, tree, two_phase
from wsekern.fabric.reductions.cost import Cost, Received
from wsekern.hardware import Machine
from wsekern.wafer.context import inside

Algorithm = Literal[
    "auto", "xla", "star", "chain", "tree", "two_phase", "optimal", "k_tree", "ring", "snake"
]


class _Reduction(NamedTuple):
    """A reduction along a line to a root, what a PE receives in it, and its terms of cost."""

    reduce: Callable
    count_received: Callable[[int, int, int], Received]
    cost: Callable[[int, float, int], Cost]


LINES: dict[str, _Reduction] = {
    "star": _Reduction(star.reduce, star.count_received, star.cost),
    "chain": _Reduction(chain.reduce, chain.count_received, chain.cost),
    "tree": _Reduction(tree.reduce, tree.count_received, tree.cost),
    "two_phase": _Reduction(two_phase.reduce, two_phase.count_received, two_phase.cost),
    "optimal": _Reduction(optimal.reduce, optimal.count_received, optimal.cost),
    "k_tree": _Reduction(k_tree.reduce, k_tree.count_received, k_tree.cost),
}
_ALL = ("auto", "xla", *LINES, "ring", "snake")


def root_of(algorithm: str, sizes: Sequence[int]) -> int:
    """The root of an all-reduce over axes of `sizes` PEs, by its row-major number."""
    root = 0
    for size in sizes:
        root = root * size + (k_tree.middle(size) if algorithm == "k_tree" else 0)
    return root


def predicted_cycles(
    algorithm: str, sizes: Sequence[int], words: float, machine: Machine, root: int | None = None
) -> float:
    """Predicted cycles of a reduction on `machine`, without the arithmetic.

    The model is that of Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024:
    `max(contention, energy / links) + distance + (2 T_R + 1) depth`.

    Args:
      algorithm: any but "auto" and "xla".
      sizes: PEs along each axis, outermost first; a single number is a line.
      words: 32-bit words of a PE's tile.
      machine: its ramps (T_R) and hops are counted.
      root: the place of the one PE that needs the result (row-major); None: every PE needs it.

    Raises:
      ValueError: `algorithm` is unknown; "snake" is not given two axes, or "ring" is given a root.
    """
    check("predicted_cycles", algorithm, len(sizes), root)
    if algorithm == "ring":
        return sum(ring.cost(size, words).cycles(machine) for size in sizes)
    places = places_of(root_of(algorithm, sizes) if root is None else root, sizes)
    if algorithm == "snake":
        pes = math.prod(sizes)
        cycles = chain.cost(pes, words, snake_place(places, sizes)).cycles(machine)
    else:
        cost = LINES[algorithm].cost
        cycles = sum(
            cost(size, words, place).cycles(machine)
            for size, place in zip(sizes, places, strict=True)
            if size > 1
        )
    if root is not None:
        return cycles
    far = [max(place, size - 1 - place) for size, place in zip(sizes, places, strict=True)]
    return cycles + flood.cost(sum(far) + 1, 1, words).cycles(machine)


def received(algorithm: str, sizes: Sequence[int], words: int, root: int | None = None) -> Received:
    """(words, steps): what the busiest PE receives in a reduction of tiles of 32-bit words.

    Args:
      algorithm: any but "auto" and "xla".
      sizes: PEs along each axis, outermost first; a single number is a line.
      words: 32-bit words of a PE's tile.
      root: the place of the one PE that needs the result (row-major); None: every PE needs it.

    Raises:
      ValueError: `algorithm` is unknown; "snake" is not given two axes, or "ring" is given a root.
    """
    check("received", algorithm, len(sizes), root)
    total = Received(0, 0)
    if algorithm == "ring":
        for size in sizes:
            total = total.plus(ring.count_received(size, words))
        return total
    places = places_of(root_of(algorithm, sizes) if root is None else root, sizes)
    if algorithm == "snake":
        # A shift of the snake is up to three moves at once, and a PE receives a tile in each.
        moves = (sizes[0] > 1) + 2 * (sizes[1] > 1)
        total = chain.count_received(math.prod(sizes), words, snake_place(places, sizes))
        total = Received(moves * total.words, total.steps)
    else:
        for size, place in zip(sizes, places, strict=True):
            total = total.plus(LINES[algorithm].count_received(size, words, place))
    return total if root is not None else total.plus(Received(words, 1))


def cheapest(
    sizes: Sequence[int], words: float, machine: Machine, root: int | None = None
) -> tuple[str, float]:
    """The name of the algorithm with the fewest predicted cycles, and these cycles.

    Args:
      sizes: PEs along each axis, outermost first; a single number is a line.
      words: 32-bit words of a PE's tile.
      machine: its ramps (T_R) and hops are counted.
      root: the place of the one PE that needs the result (row-major); None: every PE needs it.
    """
    names = [*LINES, *(["ring"] if root is None else []), *(["snake"] if len(sizes) == 2 else [])]
    cycles = {name: predicted_cycles(name, sizes, words, machine, root) for name in names}
    best = min(cycles, key=lambda name: cycles[name])
    return best, cycles[best]


def choose(algorithm: str, sizes: Sequence[int], words: float, root: int | None) -> str:
    """`algorithm`, or for "auto" the best one on the wafer whose kernel is traced."""
    if algorithm != "auto":
        return algorithm
    wafer = inside()
    if wafer is None or wafer.machine is None or math.prod(sizes) == 1:
        return "xla"
    return cheapest(sizes, words, wafer.machine, root)[0]


def places_of(root: int, sizes: Sequence[int]) -> list[int]:
    """The place along each axis of the PE with the row-major number `root`."""
    places = []
    for size in reversed(sizes):
        root, place = divmod(root, size)
        places.append(place)
    return places[::-1]


def snake_place(places: Sequence[int], sizes: Sequence[int]) -> int:
    """The place in the snake of the PE at `places` = (row, column)."""
    (y, x), width = places, sizes[1]
    return y * width + (x if y % 2 == 0 else width - 1 - x)


def check(operation: str, algorithm: str, axes: int, root: int | None) -> None:
    """Raises ValueError if there is no such algorithm, or it does not fit the axes or the root."""
    if algorithm not in _ALL:
        raise ValueError(f"fabric.{operation}: algorithm={algorithm!r} is not one of {list(_ALL)}")
    if algorithm == "snake" and axes != 2:
        raise ValueError(
            f"fabric.{operation}: algorithm='snake' winds through the two axes of the grid, it was "
            f"given {axes}; use 'chain' along one axis"
        )
    if algorithm == "ring" and root is not None:
        raise ValueError(
            f"fabric.{operation}: algorithm='ring' has no root, every PE gets the result; use "
            "all_reduce, or one of " + str(list(LINES))
        )
