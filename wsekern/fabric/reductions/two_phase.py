"""Two-phase reduction: a chain inside each group of PEs, then a chain of the groups' heads.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024. A group has about sqrt(P) PEs, and
its head is the PE nearest to the root. It is the best if a tile has about as many words as the line
has PEs.
"""

import math

import numpy as np
from jaxtyping import Array, Shaped

from wsekern.fabric.reductions import chain
from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    Two chains one after the other: of S - 1 hops in groups of S PEs, then of about P / S hops.
    """
    for chains in phases(line.size, root):
        tile = chain.run(tile, line, chains, op)
    return tile


def count_received(pes: int, words: int, root: int = 0) -> Received:
    """What the chains of both phases receive, one after the other."""
    first, second = (chain.count_received_in(chains, words) for chains in phases(pes, root))
    return first.plus(second)


def group(pes: int, root: int = 0) -> int:
    """How many PEs form a group."""
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
    """The chains inside the groups, and the chain of the heads."""
    size, place = group(pes, root), np.arange(pes)
    heads = root + np.sign(place - root) * (np.abs(place - root) // size * size)
    return chain.Chains(heads, 1), chain.Chains(np.where(heads == place, root, -1), size)
