"""Ring all-reduce: each PE sums one part of the tile, then all parts are gathered.

P. Patarasuk and X. Yuan, "Bandwidth Optimal All-reduce Algorithms for Clusters of Workstations",
2009. On a line of PEs the ring is folded, so that neighbors are at most two hops apart. It has no
root. On a wafer it pays only for tiles of very many words.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Shaped

from wsekern.fabric import exchange, moves
from wsekern.fabric.reductions.cost import Cost, Received
from wsekern.fabric.reductions.operation import Operation


def all_reduce(tile: Shaped[Array, "..."], along: str, op: Operation) -> Shaped[Array, "..."]:
    """The reduction of all tiles along `along`, on every PE.

    P - 1 steps bring `ceil(B / P)` words each, and one gather brings as many from each other PE:
    `2 (P - 1) ceil(B / P)` words in P steps.
    """
    size, at = moves.axis_size(along), moves.ring_index(along, "folded")
    width = -(-tile.size // size)
    parts = jnp.pad(tile.reshape(-1), (0, size * width - tile.size)).reshape(size, width)

    # In step s the PE at place `at` of the ring sends part at - s, to which it has added its own.
    def step(
        parts: Shaped[Array, "pes width"], s: Int[Array, ""]
    ) -> tuple[Shaped[Array, "pes width"], None]:
        arrived = moves.shift(parts[(at - s) % size], along, ring="folded")
        mine = (at - s - 1) % size
        return parts.at[mine].set(op.combine(parts[mine], arrived)), None

    parts, _ = lax.scan(step, moves.varying(parts, along), jnp.arange(size - 1))
    gathered = exchange.all_gather(parts[(at + 1) % size][None], along, replicated=True)
    # Each PE has summed the part after its place in the ring; put them in the order of the parts.
    order = np.array(moves.ring_order(size, "folded"))
    return gathered[np.roll(order, 1)].reshape(-1)[: tile.size].reshape(tile.shape)


def count_received(pes: int, words: int) -> Received:
    """`2 (P - 1) ceil(B / P)` words in P steps."""
    return Received(2 * (pes - 1) * -(-words // pes), pes) if pes > 1 else Received(0, 0)


def cost(pes: int, words: float) -> Cost:
    """`2 (P - 1) B / P + 4 P - 6 + 2 (P - 1) (2 T_R + 1)` cycles."""
    return Cost(
        contention=2 * (pes - 1) * words / pes,
        energy=0,
        links=1,
        distance=max(4 * pes - 6, 0),
        depth=2 * (pes - 1),
    )
