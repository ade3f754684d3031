"""This file is the chain reduction, in pieces: what the larger tree algorithms are made of, too.

A running sum goes from PE to PE toward the root. A tile is cut into pieces, and a PE sends one
while it receives the next: the pipelined chain of Luczynski et al., "Near-Optimal Wafer-Scale
Reduce", HPDC 2024, where a piece is a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wsekern.fabric.reductions.cost import Cost, Received, sides
from wsekern.fabric.reductions.line import Line
from wsekern.fabric.reductions.operation import Operation

_STEP_CYCLES = 6  # of a step that waits for another: a hop, and 2 T_R + 1


class Chains(NamedTuple):
    """Chains on a line that run side by side, each from both its ends to a head between them."""

    head: np.ndarray  # the head's place, of every PE that is in a chain; -1 elsewhere
    stride: int  # places between neighbors in a chain


def reduced(tile: jax.Array, line: Line, root: int, op: Operation) -> jax.Array:
    """The reduction of all tiles on a line, on its root; elsewhere what is of no use.

    With n PEs on the longer side of the root and C pieces, n + C - 1 steps in which a PE receives
    `ceil(B / C)` words from each side: B words and n steps at the least. C is about sqrt(n B / 6).
    """
    return run(tile, line, Chains(np.full(line.size, root), 1), op)


def run(tile: jax.Array, line: Line, chains: Chains, op: Operation) -> jax.Array:
    """`tile` with, on the heads, the reduction of their chains; elsewhere what is of no use."""
    head, stride = chains
    far, hops = _far(chains)
    if hops == 0:
        return tile
    pieces, whole = _cut(tile, pieces_of(hops, tile.size))
    count, fill = len(pieces), op.neutral(tile.dtype)
    late = jnp.asarray(hops - np.abs(far), jnp.int32)[line.place]
    heard = [
        (by, jnp.asarray(_hears(head, far, by))[line.place])
        for by in (stride, -stride)
        if _hears(head, far, by).any()
    ]

    def step(pieces, t):
        sent = pieces[jnp.clip(t - late, 0, count - 1)]
        at = t + 1 - late
        mine = pieces[jnp.clip(at, 0, count - 1)]
        for by, hears in heard:
            arrived = line.shift(sent, by, fill)
            due = hears & (at >= 0) & (at < count)
            mine = jnp.where(due, op.combine(mine, arrived), mine)
        return pieces.at[jnp.clip(at, 0, count - 1)].set(mine), None

    pieces, _ = lax.scan(step, pieces, jnp.arange(hops - 1 + count))
    return whole(pieces)


def received_of(chains: Chains, words: int) -> Received:
    """`ceil(B / C)` words from each side in each of n + C - 1 steps."""
    far, hops = _far(chains)
    if hops == 0:
        return Received(0, 0)
    count = pieces_of(hops, words)
    heard = [bool(_hears(chains.head, far, by * chains.stride).any()) for by in (1, -1)]
    steps = hops - 1 + count
    return Received(sum(heard) * steps * -(-words // count), steps)


def received(pes: int, words: int, root: int = 0) -> Received:
    """As `received_of`, of the chain through all PEs of the line."""
    return received_of(Chains(np.full(pes, root), 1), words)


def pieces_of(hops: int, words: float) -> int:
    """In how many pieces a tile best goes down a chain: few steps, or little to send in each."""
    return max(1, min(round(math.sqrt(hops * words / _STEP_CYCLES)), int(words)))


def cost(pes: int, words: float, root: int = 0) -> Cost:
    """`B + (2 T_R + 2) (P - 1)` cycles to a root at the end; from both sides it receives 2 B."""
    hops = max(sides(pes, root), default=0)
    return Cost(
        contention=words * len(sides(pes, root)),
        energy=words * (pes - 1),
        links=pes - 1,
        distance=hops,
        depth=hops,
    )


def _far(chains: Chains) -> tuple[np.ndarray, int]:
    """Each PE's place in its chain, counted from the head, and how long the longest chain is."""
    far = (np.arange(len(chains.head)) - chains.head) // chains.stride
    far = np.where(chains.head < 0, 0, far)
    return far, int(np.abs(far).max())


def _hears(head: np.ndarray, far: np.ndarray, by: int) -> np.ndarray:
    """Which PEs take in what their neighbor sends when all tiles move by `by` places."""
    source = np.arange(len(head)) - by
    there = (source >= 0) & (source < len(head))
    source = np.clip(source, 0, len(head) - 1)
    farther = far[source] == far - np.sign(by)
    return there & (head >= 0) & (head[source] == head) & farther & (far * by <= 0)


def _cut(tile, count):
    """A tile as `count` pieces of a row each, and how to put it together again."""
    width = -(-tile.size // count)
    flat = jnp.pad(tile.reshape(-1), (0, count * width - tile.size))

    def whole(pieces):
        return pieces.reshape(-1)[: tile.size].reshape(tile.shape)

    return flat.reshape(count, width), whole
