"""Binary tree reduction: the distance between partners doubles in each step.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024. It is the best for few words on
few PEs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    With n PEs on the longer side of the root, there are `ceil(lg(n + 1))` steps. A PE receives one
    tile in each; the root one from either side.

        place 0 is the root:   1 -> 0, 3 -> 2, 5 -> 4   then   2 -> 0, 6 -> 4   then   4 -> 0
    """
    fill, distance = op.neutral(tile.dtype), jnp.abs(line.place - root)
    for level in range(_levels(max(sides(line.size, root), default=0))):
        receives = distance % 2 ** (level + 1) == 0
        total = tile
        for by, side in ((2**level, root), (-(2**level), line.size - 1 - root)):
            if side >= 2**level:
                arrived = line.shift(tile, by, fill)
                toward_root = line.place <= root if by > 0 else line.place >= root
                total = jnp.where(receives & toward_root, op.combine(total, arrived), total)
        tile = total
    return tile


def count_received(pes: int, words: int, root: int = 0) -> Received:
    """One tile in each step, from each side that still has tiles to send."""
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
    """Steps that combine the tiles of `side` PEs and the root."""
    return side.bit_length()
