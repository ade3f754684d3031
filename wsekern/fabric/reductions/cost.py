"""This file is what a collective costs on a wafer's fabric, in cycles.

The model is that of P. Luczynski, L. Gianinazzi, P. Iff, L. Wilson, D. De Sensi and T. Hoefler,
"Near-Optimal Wafer-Scale Reduce", HPDC 2024: a link carries one word a cycle, a hop takes one
cycle, and each step that waits for another goes up and down a ramp, T_R cycles each, and takes one
more. Every algorithm's file states its own terms.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from wsekern.hardware import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The terms of one collective, of which its cycles are made."""

    contention: float  # words through the PE that most go through
    energy: float  # hops, summed over all words
    links: float  # links that carry them
    distance: float  # hops of the longest path
    depth: float  # the longest chain of steps that wait for one another

    def cycles(self, machine: Machine) -> float:
        """`max(contention, energy / links) + distance + (2 T_R + 1) depth`."""
        ramps = 2 * machine.ramp_cycles + machine.hop_cycles
        busiest = max(self.contention, self.energy / max(self.links, 1))
        return busiest + self.distance * machine.hop_cycles + ramps * self.depth


# From PEs of a line, words of a tile and the root's place to the terms of a reduction.
CostOf = Callable[[int, float, int], Cost]


class Received(NamedTuple):
    """What the PE that receives most does in a collective, off the program that runs."""

    words: int
    steps: int  # that wait for one another

    def plus(self, other: "Received") -> "Received":
        """This, and then the other."""
        return Received(self.words + other.words, self.steps + other.steps)


def sides(pes: int, root: int) -> list[int]:
    """How many PEs stand on either side of the root, without a side that has none."""
    return [side for side in (root, pes - 1 - root) if side]
