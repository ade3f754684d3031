"""This file is attention with the sequence in a ring: keys and values travel, queries stay.

Public per-PE functions. H. Liu, M. Zaharia and P. Abbeel, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", 2023. Every step sends one tile to the next PE along y, and
needs nothing of what the PE computes meanwhile.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.axes import ROWS
from wsekern.kernels import tile_attention as tile


def ring_attention(
    q: Float[Array, "nq B K G c H"], kv: Float[Array, "nk 2 B K s H"], rule: tile.Rule
) -> tile.Running:
    """The softmax over all keys along y, in p steps of one shift each (p PEs along y).

    A PE holds two tiles of keys and values at a time.
    """
    here, p = fabric.axis_index(ROWS), fabric.axis_size(ROWS)
    q_starts = starts(q, here)

    def step(carry, back):
        running, kv = carry
        coming = fabric.shift(kv, ROWS)
        running = tile.absorb(running, q, kv, q_starts, starts(kv, (here - back) % p), rule)
        return (running, coming), None

    # The last tile is met outside the loop, where it need not travel on.
    (running, kv), _ = lax.scan(step, (tile.nothing_yet(q), kv), jnp.arange(p - 1))
    return tile.absorb(running, q, kv, q_starts, starts(kv, (here + 1) % p), rule)


def ring_gradients(
    rows: tuple, kv: Float[Array, "nk 2 B K s H"], rule: tile.Rule
) -> tuple[Float[Array, "nq B K H G c"], Float[Array, "nk 2 B K s H"]]:
    """Gradients of queries, and of keys and values, in float32; p + 1 shifts.

    The gradient of a tile of keys and values follows it one step behind, so that its travel too
    needs nothing of what the PE computes meanwhile, and ends at the tile's home.
    """
    here, p = fabric.axis_index(ROWS), fabric.axis_size(ROWS)
    q_starts = starts(rows[0], here)

    def step(carry, back):
        dq, kv, dkv = carry
        coming, dkv = _shift_both(kv, dkv)
        k_starts = starts(kv, (here - back) % p)
        dq, dkv = tile.gradients(dq, dkv, rows, kv, q_starts, k_starts, rule)
        return (dq, coming, dkv), None

    dq, dkv = no_gradients(rows[0], kv)
    (dq, _, dkv), _ = lax.scan(step, (dq, kv, dkv), jnp.arange(p))
    return dq, fabric.shift(dkv, ROWS)


def no_gradients(q, kv):
    dq = jnp.zeros(q.swapaxes(-3, -1).swapaxes(-2, -1).shape, jnp.float32)
    return fabric.varying((dq, jnp.zeros(kv.shape, jnp.float32)))


def starts(x: Float[Array, "n ..."], place) -> jnp.ndarray:
    """The position at which each of the blocks `x` begins, in the tile of PE `place` along y."""
    n, c = x.shape[0], x.shape[-2]
    return (place * n + jnp.arange(n)) * c


def _shift_both(kv, dkv):
    if kv.dtype != dkv.dtype:
        return fabric.shift((kv, dkv), ROWS)
    moved = fabric.shift(jnp.stack([kv, dkv]), ROWS)
    return moved[0], moved[1]
