"""This file is the binary tree reduction: in each step the distance between partners doubles.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024: the best for few words on few PEs.
"""

import jax
import jax.numpy as jnp

from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduced(tile: jax.Array, line: Line, root: int, op: Operation) -> jax.Array:
    """The reduction of all tiles on a line, on its root; elsewhere what is of no use.

    With n PEs on the longer side of the root, `ceil(lg(n + 1))` steps; a PE receives the tile once
    in each, the root from both sides.
    """
    fill, far = op.neutral(tile.dtype), jnp.abs(line.place - root)
    for level in range(_levels(max(sides(line.size, root), default=0))):
        hears = far % 2 ** (level + 1) == 0
        total = tile
        for by, side in ((2**level, root), (-(2**level), line.size - 1 - root)):
            if side >= 2**level:
                arrived = line.shift(tile, by, fill)
                inwards = line.place <= root if by > 0 else line.place >= root
                total = jnp.where(hears & inwards, op.combine(total, arrived), total)
        tile = total
    return tile


def received(pes: int, words: int, root: int = 0) -> Received:
    """The tile once in each step, from each side that still has PEs to hear."""
    levels = [_levels(side) for side in sides(pes, root)]
    return Received(sum(levels) * words, max(levels, default=0))


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`max(B lg P, B P lg P / (2 (P - 1))) + P - 1 + (2 T_R + 1) lg P` cycles."""
    levels = [_levels(side) for side in sides(pes, root)]
    energy = sum(
        words * (side + 1) * n / 2 for side, n in zip(sides(pes, root), levels, strict=True)
    )
    return Cost(
        contention=words * sum(levels),
        energy=energy,
        links=pes - 1,
        distance=max(sides(pes, root), default=0),
        depth=max(levels, default=0),
    )


def _levels(side: int) -> int:
    """Steps that bring `side` PEs and the root together."""
    return side.bit_length()
