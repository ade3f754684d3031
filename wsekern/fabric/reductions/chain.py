"""Chain reduction: a running sum passed from PE to PE toward the root, in a pipeline of pieces.

A tile is cut into pieces, and a PE sends one while it receives the next. That is the pipelined
chain of Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024, where a piece is one word.
The two-phase and K-tree reductions are made of chains too.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation

_STEP_CYCLES = 6  # of a step that waits for another: one for the hop, and 2 T_R + 1 = 5


class Chains(NamedTuple):
    """Chains on a line that run at once, each from its two ends to a head between them."""

    head: Int[np.ndarray, " pes"]  # the place of each PE's head; -1 for a PE in no chain
    stride: int  # places between neighbors in a chain


def reduce(
    tile: Shaped[Array, "..."], line: Line, root: int, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of all tiles on a line, on its root; on other PEs a value without meaning.

    With n PEs on the longer side of the root and C pieces, there are n + C - 1 steps, and in each a
    PE receives `ceil(B / C)` words from each side: at least B words and n steps. C is about
    sqrt(n B / 6).
    """
    return run(tile, line, Chains(np.full(line.size, root), 1), op)


def run(
    tile: Shaped[Array, "..."], line: Line, chains: Chains, op: Operation
) -> Shaped[Array, "..."]:
    """The reduction of each chain, on its head; on other PEs a value without meaning."""
    head, stride = chains
    offset, hops = _offsets(chains)
    if hops == 0:
        return tile
    pieces, whole = _cut(tile, pieces_of(hops, tile.size))
    count, fill = len(pieces), op.neutral(tile.dtype)
    # The ends of the longest chain start at step 0; a PE one hop nearer to its head starts one step
    # later. In step t a PE sends piece t - delay and receives the piece after it:
    #   step   end of the chain   next PE
    #   0      sends 0            receives 0
    #   1      sends 1            sends 0, receives 1
    delay = jnp.asarray(hops - np.abs(offset), jnp.int32)[line.place]
    directions = [
        (by, jnp.asarray(_receives(head, offset, by))[line.place])
        for by in (stride, -stride)
        if _receives(head, offset, by).any()
    ]

    def step(
        pieces: Shaped[Array, "count width"], t: Int[Array, ""]
    ) -> tuple[Shaped[Array, "count width"], None]:
        # Indices are clipped and what arrives out of turn is masked: all PEs run one program.
        sent = pieces[jnp.clip(t - delay, 0, count - 1)]
        at = t + 1 - delay
        mine = pieces[jnp.clip(at, 0, count - 1)]
        for by, receives in directions:
            arrived = line.shift(sent, by, fill)
            due = receives & (at >= 0) & (at < count)
            mine = jnp.where(due, op.combine(mine, arrived), mine)
        return pieces.at[jnp.clip(at, 0, count - 1)].set(mine), None

    pieces, _ = lax.scan(step, pieces, jnp.arange(hops - 1 + count))
    return whole(pieces)


def count_received_in(chains: Chains, words: int) -> Received:
    """`ceil(B / C)` words from each side in each of n + C - 1 steps."""
    offset, hops = _offsets(chains)
    if hops == 0:
        return Received(0, 0)
    count = pieces_of(hops, words)
    strides = (chains.stride, -chains.stride)
    sides_used = sum(bool(_receives(chains.head, offset, by).any()) for by in strides)
    steps = hops - 1 + count
    return Received(sides_used * steps * -(-words // count), steps)


def count_received(pes: int, words: int, root: int = 0) -> Received:
    """As `count_received_in`, for the chain through all PEs of a line."""
    return count_received_in(Chains(np.full(pes, root), 1), words)


def pieces_of(hops: int, words: float) -> int:
    """Into how many pieces to cut a tile: more of them make longer pipelines of shorter steps.

    With C pieces there are about n + C steps of B / C words and 6 cycles each; their sum is least
    at C = sqrt(n B / 6).
    """
    return max(1, min(round(math.sqrt(hops * words / _STEP_CYCLES)), int(words)))


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`B + (2 T_R + 2) (P - 1)` cycles to a root at the end; between ends, it receives 2 B."""
    hops = max(sides(pes, root), default=0)
    return Cost(
        contention=words * len(sides(pes, root)),
        energy=words * (pes - 1),
        links=pes - 1,
        distance=hops,
        depth=hops,
    )


def _offsets(chains: Chains) -> tuple[Int[np.ndarray, " pes"], int]:
    """Each PE's place in its chain, counted from the head, and the hops of the longest chain."""
    offset = (np.arange(len(chains.head)) - chains.head) // chains.stride
    offset = np.where(chains.head < 0, 0, offset)
    return offset, int(np.abs(offset).max())


def _receives(
    head: Int[np.ndarray, " pes"], offset: Int[np.ndarray, " pes"], by: int
) -> Bool[np.ndarray, " pes"]:
    """Which PEs combine what arrives when all tiles move by `by` places.

    Those whose sender is in the same chain and one hop farther from the head, on the side from
    which the tiles come.
    """
    source = np.arange(len(head)) - by
    exists = (source >= 0) & (source < len(head))
    source = np.clip(source, 0, len(head) - 1)
    farther = offset[source] == offset - np.sign(by)
    return exists & (head >= 0) & (head[source] == head) & farther & (offset * by <= 0)


def _cut(
    tile: Shaped[Array, "..."], count: int
) -> tuple[
    Shaped[Array, "count width"], Callable[[Shaped[Array, "count width"]], Shaped[Array, "..."]]
]:
    """A tile as `count` pieces, and the function that joins them again."""
    width = -(-tile.size // count)
    flat = jnp.pad(tile.reshape(-1), (0, count * width - tile.size))

    def whole(pieces: Shaped[Array, "count width"]) -> Shaped[Array, "..."]:
        return pieces.reshape(-1)[: tile.size].reshape(tile.shape)

    return flat.reshape(count, width), whole
