"""This file is the cost-optimal tree reduction, found by dynamic programming over its depth.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024: of all trees on n PEs in which no
chain of steps is longer than d, the one whose words make the fewest hops,
`E(n, d) = min over s of E(s, d - 1) + E(n - s, d) + n - s`; then the depth that costs least.
"""

import collections
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np

from wsekern.fabric import moves
from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation

_RAMPS = 5  # 2 T_R + 1 cycles of a step; T_R is 2 on every wafer whose figure is known


def reduced(tile: jax.Array, line: Line, root: int, op: Operation) -> jax.Array:
    """The reduction of all tiles on a line, on its root; elsewhere what is of no use.

    As many steps as the tree's PEs need to hear their children one after another; a PE receives
    the tile once for each child.
    """
    assert line.axis is not None
    fill = op.neutral(tile.dtype)
    for pairs in rounds(line.size, tile.size * tile.dtype.itemsize / 4, root):
        tile = op.combine(tile, moves.route(tile, line.axis, pairs, fill=fill))
    return tile


def received(pes: int, words: int, root: int = 0) -> Received:
    """The tile in each step at the most."""
    steps = len(rounds(pes, words, root))
    return Received(steps * words, steps)


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`min over d of B E(P, d) / (P - 1) + P - 1 + (2 T_R + 1) d` cycles, as published.

    That takes the fabric to be evenly used; where a PE of the tree found has many children, what
    they send it, one after another, is the cost.
    """
    depths = [_best_depth(side + 1, words) for side in sides(pes, root)]
    ends = [side + 1 for side in sides(pes, root)]
    hops = sum(_fewest_hops(n)[d, n] for n, d in zip(ends, depths, strict=True))
    return Cost(
        contention=words * _most_children(pes, words, root),
        energy=words * float(hops),
        links=pes - 1,
        distance=max(sides(pes, root), default=0),
        depth=max(depths, default=0),
    )


@functools.lru_cache(maxsize=1024)
def _most_children(pes: int, words: float, root: int) -> int:
    parents = [b for pairs in rounds(pes, words, root) for _, b in pairs]
    return max(collections.Counter(parents).values(), default=0)


@functools.lru_cache(maxsize=256)
def rounds(pes: int, words: float, root: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What is sent in each step: (source, destination) places, each at most once on either side."""
    edges = []
    for by, side in ((-1, root), (1, pes - 1 - root)):
        edges += [(root + by * a, root + by * b) for a, b in tree(side + 1, words)]
    ready = dict.fromkeys(range(pes), 0)  # steps after which a PE has heard all so far
    sent: dict[int, list[tuple[int, int]]] = {}
    for source, destination in _children_first(edges, root):
        step = max(ready[source], ready[destination])
        sent.setdefault(step, []).append((source, destination))
        ready[destination] = step + 1
    return tuple(tuple(sent[step]) for step in sorted(sent))


def tree(pes: int, words: float) -> list[tuple[int, int]]:
    """The edges (child, parent) of the tree on places 0 to `pes - 1`, whose root is place 0."""
    return list(_edges(0, pes, _best_depth(pes, words), _fewest_hops(pes)))


def _edges(root: int, pes: int, depth: int, fewest: np.ndarray) -> Iterator[tuple[int, int]]:
    while pes > 1:
        parts = np.arange(1, pes)  # PEs of the farthest child's own tree
        hops = fewest[depth - 1, parts] + fewest[depth, pes - parts] + pes - parts
        part = int(parts[np.argmin(hops)])
        yield root + pes - part, root
        yield from _edges(root + pes - part, part, depth - 1, fewest)
        pes -= part


def _children_first(edges: list[tuple[int, int]], root: int) -> Iterator[tuple[int, int]]:
    """The edges in an order in which a PE has heard all its children, the nearest first."""
    children: dict[int, list[int]] = {}
    for child, parent in edges:
        children.setdefault(parent, []).append(child)

    def below(parent: int) -> Iterator[tuple[int, int]]:
        for child in sorted(children.get(parent, []), key=lambda place: abs(place - parent)):
            yield from below(child)
            yield child, parent

    return below(root)


def _best_depth(pes: int, words: float) -> int:
    if pes == 1:
        return 0
    depths = np.arange(1, len(_fewest_hops(pes)))
    cycles = words * _fewest_hops(pes)[1:, pes] / (pes - 1) + _RAMPS * depths
    return int(depths[np.argmin(cycles)])


@functools.lru_cache(maxsize=64)
def _fewest_hops(pes: int) -> np.ndarray:
    """`E(n, d)` as [d, n] for all n up to `pes`, d up to 4 sqrt P: beyond, a chain is as good."""
    deepest = min(pes - 1, math.ceil(4 * math.sqrt(pes)))
    fewest = np.full((deepest + 1, pes + 1), np.inf)
    fewest[:, :2] = 0
    for depth in range(1, deepest + 1):
        row, above = fewest[depth], fewest[depth - 1]
        for n in range(2, pes + 1):
            parts = np.arange(1, n)
            row[n] = np.min(above[1:n] + row[n - 1 : 0 : -1] + n - parts)
    return fewest
