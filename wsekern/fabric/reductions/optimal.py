"""Cost-optimal tree reduction, found by dynamic programming over the tree's depth.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024. Among the trees on n PEs without a
chain of more than d steps, take the one whose words make the fewest hops,
`E(n, d) = min over s of E(s, d - 1) + E(n - s, d) + n - s`; then take the depth d that costs least.
"""

import collections
import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float, Shaped

from wsekern.fabric import moves
from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation

_RAMPS = 5  # cycles of a step, 2 T_R + 1; T_R is 2 on every wafer with a published figure


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    A PE receives one tile from each of its children in the tree, one after another. There are as
    many steps as that takes.
    """
    assert line.axis is not None
    fill = op.neutral(tile.dtype)
    for pairs in rounds(line.size, tile.size * tile.dtype.itemsize / 4, root):
        tile = op.combine(tile, moves.route(tile, line.axis, pairs, fill=fill))
    return tile


def count_received(pes: int, words: int, root: int = 0) -> Received:
    """At most one tile in each step."""
    steps = len(rounds(pes, words, root))
    return Received(steps * words, steps)


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`min over d of B E(P, d) / (P - 1) + P - 1 + (2 T_R + 1) d` cycles, as published.

    The published formula assumes that the fabric is evenly used. If a PE has many children, the
    cost is what they send it, one after another.
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
    """The pairs of (source, destination) in each step; a place is once in them on either side."""
    edges = []
    for by, side in ((-1, root), (1, pes - 1 - root)):
        edges += [(root + by * a, root + by * b) for a, b in tree(side + 1, words)]
    ready = dict.fromkeys(range(pes), 0)  # the step from which on each PE is free
    sent: dict[int, list[tuple[int, int]]] = {}
    for source, destination in _children_first(edges, root):
        step = max(ready[source], ready[destination])
        sent.setdefault(step, []).append((source, destination))
        ready[destination] = step + 1
    return tuple(tuple(sent[step]) for step in sorted(sent))


def tree(pes: int, words: float) -> list[tuple[int, int]]:
    """The edges (child, parent) of the tree on places 0 to `pes - 1`; place 0 is its root."""
    return list(_edges(0, pes, _best_depth(pes, words), _fewest_hops(pes)))


def _edges(
    root: int, pes: int, depth: int, fewest: Float[np.ndarray, "depths sizes"]
) -> Iterator[tuple[int, int]]:
    while pes > 1:
        # The farthest child has a tree of its own, of `part` PEs at the far end; what is left has
        # the same root and depth.
        parts = np.arange(1, pes)
        hops = fewest[depth - 1, parts] + fewest[depth, pes - parts] + pes - parts
        part = int(parts[np.argmin(hops)])
        yield root + pes - part, root
        yield from _edges(root + pes - part, part, depth - 1, fewest)
        pes -= part


def _children_first(edges: list[tuple[int, int]], root: int) -> Iterator[tuple[int, int]]:
    """The edges, each after those of the child's own children; the nearest child comes first."""
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
def _fewest_hops(pes: int) -> Float[np.ndarray, "depths sizes"]:
    """`E(n, d)` as [d, n], for n up to `pes` and d up to 4 sqrt(P): deeper, a chain is as good."""
    deepest = min(pes - 1, math.ceil(4 * math.sqrt(pes)))
    fewest = np.full((deepest + 1, pes + 1), np.inf)
    fewest[:, :2] = 0
    for depth in range(1, deepest + 1):
        row, above = fewest[depth], fewest[depth - 1]
        for n in range(2, pes + 1):
            parts = np.arange(1, n)
            row[n] = np.min(above[1:n] + row[n - 1 : 0 : -1] + n - parts)
    return fewest
