"""This file is the flood: one PE's tile on every other, as the routers multicast it.

A router passes a word on in several directions at once, so that a broadcast costs what the farthest
PE's copy costs: Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.fabric import moves
from wsekern.fabric.cost import Cost


def flooded(tile: jax.Array, along: moves.Along, root: int) -> jax.Array:
    """The root's tile, on every PE along `along`: one step, in which a PE receives B words.

    JAX knows that it is the same everywhere. On devices it is a sum to which all others add zero.
    """
    names = moves.names_of(along)
    # A select, not a product: whatever the others hold, an infinity included, adds nothing.
    kept = jnp.where(moves.axis_index(along) == root, tile, jnp.zeros((), tile.dtype))
    if tile.dtype == jnp.bool_:
        return flood(kept.astype(jnp.int32), names).astype(jnp.bool_)
    return flood(kept, names)


# Its name stays in the trace, where it tells this sum, which is a multicast, from a reduction.
@functools.partial(jax.jit, static_argnames="names")
def flood(kept: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """The sum over the axes that the mesh calls `names` of what only one PE has not zeroed."""
    for name in reversed(names) if moves.virtual() else [names]:
        kept = lax.psum(kept, name)
    return kept


def cost(height: int, width: int, words: float) -> Cost:
    """`B + M + N - 2 + 2 T_R + 1` cycles from a corner of M x N PEs; a line is 1 x N."""
    return Cost(contention=words, energy=0, links=1, distance=height + width - 2, depth=1)
