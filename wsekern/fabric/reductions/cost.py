"""Cycles of a collective on a wafer's fabric, from five terms.

The model is that of P. Luczynski, L. Gianinazzi, P. Iff, L. Wilson, D. De Sensi and T. Hoefler,
"Near-Optimal Wafer-Scale Reduce", HPDC 2024. A link carries one word a cycle and a hop takes one
cycle. A step that waits for another goes up and down a ramp between PE and router, T_R cycles each
way, and takes one cycle more. Every algorithm's file gives its own terms.
"""

import dataclasses
from typing import NamedTuple

from wsekern.hardware import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The five terms of one collective's cycles."""

    contention: float  # words through the busiest PE
    energy: float  # hops, summed over all words
    links: float  # over which these hops are spread
    distance: float  # hops of the longest path
    depth: float  # the longest chain of steps that wait for one another

    def cycles(self, machine: Machine) -> float:
        """`max(contention, energy / links) + distance + (2 T_R + 1) depth`."""
        ramps = 2 * machine.ramp_cycles + machine.hop_cycles
        busiest = max(self.contention, self.energy / max(self.links, 1))
        return busiest + self.distance * machine.hop_cycles + ramps * self.depth


class Received(NamedTuple):
    """What the busiest PE receives in a collective, counted from the program that runs."""

    words: int
    steps: int  # that wait for one another

    def plus(self, other: "Received") -> "Received":
        """This one, and then the other."""
        return Received(self.words + other.words, self.steps + other.steps)


def sides(pes: int, root: int) -> list[int]:
    """How many PEs stand on each side of the root; a side without PEs is left out."""
    return [side for side in (root, pes - 1 - root) if side]
