"""This file is the flood: one PE's tile on every other, as the routers multicast it.

A router passes a word on in several directions at once, so that a broadcast costs what the farthest
PE's copy costs: Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.fabric import jax_collectives, moves
from wsekern.fabric.reductions.cost import Cost


def flood(x: Any, along: moves.Along) -> Any:
    """What one PE along `along` has of each element, on every PE: one step of B words.

    JAX knows that it is the same everywhere. On devices it is a sum.

    Args:
      x: a tile, or a pytree of tiles; each element is zero on all PEs but one, as where the root
        has kept its tile, or where several have a part of one.
      along: one axis or several.
    """
    names = moves.names_of(along)

    def one(tile):
        if tile.dtype == jnp.bool_:
            return _multicast(tile.astype(jnp.int32), names).astype(jnp.bool_)
        return _multicast(tile, names)

    return jax.tree.map(one, x)


def from_root(x: Any, along: moves.Along, root: int) -> Any:
    """The root's `x`, on every PE along `along`."""
    mine = moves.axis_index(along) == root
    # A select, not a product: whatever the others hold, an infinity included, adds nothing.
    return flood(
        jax.tree.map(lambda tile: jnp.where(mine, tile, jnp.zeros((), tile.dtype)), x), along
    )


def _sum(tile: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax_collectives.reduce_over(lax.psum, tile, names)


# The name stays in the trace, where it tells this sum, which is a multicast, from a reduction.
_sum.__name__ = "flood"
_multicast = jax.jit(_sum, static_argnames="names")


def cost(height: int, width: int, words: float) -> Cost:
    """`B + M + N - 2 + 2 T_R + 1` cycles from a corner of M x N PEs; a line is 1 x N."""
    return Cost(contention=words, energy=0, links=1, distance=height + width - 2, depth=1)
