"""This file is the two-phase reduction: chains inside groups, then a chain of the groups' heads.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024: groups of about sqrt P PEs, whose
heads are the PEs nearest to the root; the best where a tile has about as many words as the line
has PEs.
"""

import math

import jax
import numpy as np

from wsekern.fabric.reductions import chain
from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduced(tile: jax.Array, line: Line, root: int, op: Operation) -> jax.Array:
    """The reduction of all tiles on a line, on its root; elsewhere what is of no use.

    Two chains one after another, of `S - 1` and about `P / S` hops: see `chain.reduced`.
    """
    for chains in phases(line.size, root):
        tile = chain.run(tile, line, chains, op)
    return tile


def received(pes: int, words: int, root: int = 0) -> Received:
    """The chains' of both phases, one after the other."""
    first, second = (chain.received_of(chains, words) for chains in phases(pes, root))
    return first.plus(second)


def group(pes: int, root: int = 0) -> int:
    """PEs of a group."""
    return max(1, round(math.sqrt(max(sides(pes, root), default=0) + 1)))


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """About `max(2 B, energy / links) + P - 1 + (2 T_R + 1) (2 sqrt(P) - 2)` cycles."""
    size = group(pes, root)
    groups = [(side + 1 + size - 1) // size for side in sides(pes, root)]
    across = sum(size * (count - 1) for count in groups)
    within = pes - 1 - sum(count - 1 for count in groups)
    hops = max(sides(pes, root), default=0)
    return Cost(
        contention=2 * words * len(groups),
        energy=words * (within + across),
        links=pes - 1,
        distance=hops,
        depth=min(size - 1, hops) + max(groups, default=1) - 1,
    )


def phases(pes: int, root: int) -> tuple[chain.Chains, chain.Chains]:
    """The chains of either phase."""
    size, place = group(pes, root), np.arange(pes)
    heads = root + np.sign(place - root) * (np.abs(place - root) // size * size)
    return chain.Chains(heads, 1), chain.Chains(np.where(heads == place, root, -1), size)
