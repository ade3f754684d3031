"""This file is the K-tree reduction of two levels: two-sided chains to the middle, twice.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025: inside a group
of PEs a chain comes from either end to the one in the middle, the middles are chained likewise to
the root, and the sum is flooded back both ways. Half of the hops and half of the steps of chains
from end to end; the decode products of that system are built on it.
"""

import math

import jax
import numpy as np

from wsekern.fabric.reductions import chain
from wsekern.fabric.reductions.cost import Cost, Received
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduced(tile: jax.Array, line: Line, root: int, op: Operation) -> jax.Array:
    """The reduction of all tiles on a line, on its root; elsewhere what is of no use.

    Two chains one after another, of about `sqrt(P) / 2` hops each where the root is in the middle:
    see `chain.reduced`.
    """
    for chains in levels(line.size, root):
        tile = chain.run(tile, line, chains, op)
    return tile


def received(pes: int, words: int, root: int) -> Received:
    """The chains' of both levels, one after the other."""
    first, second = (chain.received_of(chains, words) for chains in levels(pes, root))
    return first.plus(second)


def middle(pes: int) -> int:
    """Where the root of an all-reduce stands: in the middle of a group near the line's middle."""
    size = group(pes)
    return min(pes - 1, pes // size // 2 * size + size // 2)


def group(pes: int) -> int:
    """PEs of a group: about sqrt P of them, and a divisor of P where one is near."""
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
    received = sum(bool((far < 0).any()) + bool((far > 0).any()) for far in to_root)
    groups = int(across.max() - across.min()) + 1
    return Cost(
        contention=words * received,
        energy=words * (pes - groups + size * (groups - 1)),
        links=pes - 1,
        distance=max(root, pes - 1 - root),
        depth=int(np.abs(within).max() + np.abs(across).max()),
    )


def levels(pes: int, root: int) -> tuple[chain.Chains, chain.Chains]:
    """The chains of either level."""
    heads, size = _heads(pes, root)
    among = np.where(heads == np.arange(pes), root, -1)
    return chain.Chains(heads, 1), chain.Chains(among, size)


def _heads(pes: int, root: int) -> tuple[np.ndarray, int]:
    """The head of each PE's group, and how far apart heads are; the root is one of them."""
    size = group(pes)
    number = (np.arange(pes) - root + size // 2) // size
    number = np.clip(number, -(root // size), (pes - 1 - root) // size)
    return root + number * size, size
