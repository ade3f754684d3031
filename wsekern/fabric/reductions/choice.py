"""This file is which algorithms a reduction can take, and which one "auto" does.

On devices XLA's own collective is right. On a wafer it is the one that is predicted to take the
fewest cycles, by the model of `cost`.
"""

from __future__ import annotations

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
    """A reduction along a line to a root, and its terms of cost."""

    reduced: Callable
    received: Callable[[int, int, int], Received]
    cost: Callable[[int, float, int], Cost]


LINES: dict[str, _Reduction] = {
    "star": _Reduction(star.reduced, star.received, star.cost),
    "chain": _Reduction(chain.reduced, chain.received, chain.cost),
    "tree": _Reduction(tree.reduced, tree.received, tree.cost),
    "two_phase": _Reduction(two_phase.reduced, two_phase.received, two_phase.cost),
    "optimal": _Reduction(optimal.reduced, optimal.received, optimal.cost),
    "k_tree": _Reduction(k_tree.reduced, k_tree.received, k_tree.cost),
}
_ALL = ("auto", "xla", *LINES, "ring", "snake")


def root_of(algorithm: str, sizes: Sequence[int]) -> int:
    """Where an all-reduce over axes of `sizes` PEs has its root: its number, row-major."""
    root = 0
    for size in sizes:
        root = root * size + (k_tree.middle(size) if algorithm == "k_tree" else 0)
    return root


def predicted_cycles(
    algorithm: str, sizes: Sequence[int], words: float, machine: Machine, root: int | None = None
) -> float:
    """Cycles of a reduction on `machine`; what combining two words takes is not counted.

    Args:
      algorithm: any but "auto" and "xla".
      sizes: PEs along each axis, outermost first; one number is a line.
      words: 32-bit words of a PE's tile.
      machine: whose ramps and hops to count.
      root: the place of the one PE that needs the result (row-major); None: every PE needs it.

    Raises:
      ValueError: `algorithm` is unknown, or cannot serve.
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
    """What the PE that receives most does in a reduction of 32-bit tiles: words, and steps.

    Args:
      algorithm: any but "auto" and "xla".
      sizes: PEs along each axis, outermost first; one number is a line.
      words: of a PE's tile.
      root: the place of the one PE that needs the result (row-major); None: every PE needs it.

    Raises:
      ValueError: `algorithm` is unknown, or cannot serve.
    """
    check("received", algorithm, len(sizes), root)
    total = Received(0, 0)
    if algorithm == "ring":
        for size in sizes:
            total = total.plus(ring.received(size, words))
        return total
    places = places_of(root_of(algorithm, sizes) if root is None else root, sizes)
    if algorithm == "snake":
        # Moves side by side for each of the chain's, of which a PE takes one: see line.snake.
        moves = (sizes[0] > 1) + 2 * (sizes[1] > 1)
        total = chain.received(math.prod(sizes), words, snake_place(places, sizes))
        total = Received(moves * total.words, total.steps)
    else:
        for size, place in zip(sizes, places, strict=True):
            total = total.plus(LINES[algorithm].received(size, words, place))
    return total if root is not None else total.plus(Received(words, 1))


def cheapest(
    sizes: Sequence[int], words: float, machine: Machine, root: int | None = None
) -> tuple[str, float]:
    """The algorithm predicted to take the fewest cycles, and these; arguments as above."""
    names = [*LINES, *(["ring"] if root is None else []), *(["snake"] if len(sizes) == 2 else [])]
    cycles = {name: predicted_cycles(name, sizes, words, machine, root) for name in names}
    best = min(cycles, key=lambda name: cycles[name])
    return best, cycles[best]


def chosen(algorithm: str, sizes: Sequence[int], words: float, root: int | None) -> str:
    """`algorithm`, or what "auto" takes for it where this trace runs."""
    if algorithm != "auto":
        return algorithm
    wafer = inside()
    if wafer is None or wafer.machine is None or math.prod(sizes) == 1:
        return "xla"
    return cheapest(sizes, words, wafer.machine, root)[0]


def places_of(root: int, sizes: Sequence[int]) -> list[int]:
    """The place along each axis of the PE that is number `root`, row-major."""
    places = []
    for size in reversed(sizes):
        root, place = divmod(root, size)
        places.append(place)
    return places[::-1]


def snake_place(places: Sequence[int], sizes: Sequence[int]) -> int:
    """The place in the snake of the PE at `places` = (row, column)."""
    (y, x), width = places, sizes[1]
    return y * width + (x if y % 2 == 0 else width - 1 - x)


def check(what: str, algorithm: str, axes: int, root: int | None) -> None:
    """Raises ValueError where there is no such algorithm, or it cannot serve."""
    if algorithm not in _ALL:
        raise ValueError(f"fabric.{what}: algorithm={algorithm!r} is not one of {list(_ALL)}")
    if algorithm == "snake" and axes != 2:
        raise ValueError(
            f"fabric.{what}: algorithm='snake' winds through the two axes of the grid, it was "
            f"given {axes}; use 'chain' along one axis"
        )
    if algorithm == "ring" and root is not None:
        raise ValueError(
            f"fabric.{what}: algorithm='ring' has no root, every PE gets the result; use "
            "all_reduce, or one of " + str(list(LINES))
        )
