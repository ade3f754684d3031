"""Star reduction: every tile travels to the root, which adds what arrives.

Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024. It is the best for one word.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation

_Carry = tuple[Shaped[Array, "..."], list[Shaped[Array, "..."]]]  # the total, tiles on their way


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    With n PEs on the longer side of the root, there are n steps, and in each every tile moves one
    place nearer. A PE receives n B words from each side of the root.
    """
    fill = op.neutral(tile.dtype)
    directions = [by for by, side in ((1, root), (-1, line.size - 1 - root)) if side]

    def step(carry: _Carry, _: None) -> tuple[_Carry, None]:
        total, traveling = carry
        traveling = [line.shift(t, by, fill) for t, by in zip(traveling, directions, strict=True)]
        for arrived in traveling:
            total = op.combine(total, arrived)
        return (total, traveling), None

    start = (tile, [tile] * len(directions))
    (total, _), _ = lax.scan(step, start, length=max(sides(line.size, root), default=0))
    return jnp.where(line.place == root, total, tile)


def count_received(pes: int, words: int, root: int = 0) -> Received:
    """`n B` words from each side, in n steps."""
    steps = max(sides(pes, root), default=0)
    return Received(len(sides(pes, root)) * steps * words, steps)


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`B (P - 1)` words through the root, one after another: `B (P - 1) + 2 T_R + 1` cycles."""
    hops = sum(side * (side + 1) / 2 for side in sides(pes, root))
    return Cost(
        contention=words * (pes - 1), energy=words * hops, links=pes - 1, distance=0, depth=1
    )
