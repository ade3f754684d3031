"""K-tree reduction with two levels: chains from both ends to the middle, twice.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025. Inside a group
of PEs, chains run from both ends to the PE in the middle; the middles are chained in the same way
to the root; the sum is flooded back both ways. That takes half the hops and half the steps of
chains from end to end. The decode products of that system are built on it.
"""

import math

import numpy as np
from jaxtyping import Array, Int, Shaped

from wsekern.fabric.reductions import chain
from wsekern.fabric.reductions.cost import Cost, Received
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    Two chains one after the other, of about `sqrt(P) / 2` hops each if the root is in the middle.
    """
    for chains in levels(line.size, root):
        tile = chain.run(tile, line, chains, op)
    return tile


def count_received(pes: int, words: int, root: int) -> Received:
    """What the chains of both levels receive, one after the other."""
    first, second = (chain.count_received_in(chains, words) for chains in levels(pes, root))
    return first.plus(second)


def middle(pes: int) -> int:
    """The place of an all-reduce's root: the middle of a group near the middle of the line."""
    size = group(pes)
    return min(pes - 1, pes // size // 2 * size + size // 2)


def group(pes: int) -> int:
    """How many PEs form a group: about sqrt(P), a divisor of P if one is near."""
    near = math.sqrt(pes)
    divisors = [size for size in range(1, pes + 1) if pes % size == 0]
    best = min(divisors, key=lambda size: abs(math.log(size / near)))
    return best if near / 2 <= best <= near * 2 else round(near)


def cost(pes: int, words: float, root: int | None = None) -> Cost:
    """`4 B + P / 2 + (2 T_R + 1) (G + P / G) / 2` cycles with the root in the middle."""
    root = middle(pes) if root is None else root
    heads, size = _heads(pes, root)
    within, across = np.arange(pes) - heads, (heads - root) // size
    to_root = [within[heads == root], across]
    tiles = sum(bool((hops < 0).any()) + bool((hops > 0).any()) for hops in to_root)
    groups = int(across.max() - across.min()) + 1
    return Cost(
        contention=words * tiles,  # through the root, the busiest PE
        energy=words * (pes - groups + size * (groups - 1)),
        links=pes - 1,
        distance=max(root, pes - 1 - root),
        depth=int(np.abs(within).max() + np.abs(across).max()),
    )


def levels(pes: int, root: int) -> tuple[chain.Chains, chain.Chains]:
    """The chains inside the groups, and the chain of the groups' heads."""
    heads, size = _heads(pes, root)
    among = np.where(heads == np.arange(pes), root, -1)
    return chain.Chains(heads, 1), chain.Chains(among, size)


def _heads(pes: int, root: int) -> tuple[Int[np.ndarray, " pes"], int]:
    """The place of each PE's head, and how far apart heads are; the root is one of them."""
    size = group(pes)
    # Groups are counted from the root's, number 0. If a group's head would lie beyond an end of the
    # line, its PEs join the next group.
    number = (np.arange(pes) - root + size // 2) // size
    number = np.clip(number, -(root // size), (pes - 1 - root) // size)
    return root + number * size, size
