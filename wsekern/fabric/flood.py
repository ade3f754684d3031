"""Flood: one PE's tile on every other PE, as the routers multicast it.

A router passes a word on in several directions at once. So a broadcast costs no more than the copy
for the farthest PE: Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from wsekern.fabric import jax_collectives, moves
from wsekern.fabric.reductions.cost import Cost


def flood(x: moves.TileTree, along: moves.Along) -> moves.TileTree:
    """Every element of `x` from the one PE where it is not zero, on every PE.

    One step of B words for a tile of B. JAX types the result as the same on every PE. On devices it
    is a sum.

    Args:
      x: a tile, or a pytree of tiles; each element must be zero on all PEs but one. The root may
        hold the whole tile, or several PEs a part each.
      along: one axis or several.
    """
    names = moves.names_of(along)

    def flood_tile(tile: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        if tile.dtype == jnp.bool_:
            return _multicast(tile.astype(jnp.int32), names).astype(jnp.bool_)
        return _multicast(tile, names)

    return jax.tree.map(flood_tile, x)


def from_root(x: moves.TileTree, along: moves.Along, root: int) -> moves.TileTree:
    """The root's `x`, on every PE along `along`."""
    is_root = moves.axis_index(along) == root
    # A select and not a product: an infinity on another PE times zero would be a NaN.
    return flood(
        jax.tree.map(lambda tile: jnp.where(is_root, tile, jnp.zeros((), tile.dtype)), x), along
    )


def _sum(tile: Shaped[Array, "..."], names: tuple[str, ...]) -> Shaped[Array, "..."]:
    return jax_collectives.reduce_over(lax.psum, tile, names)


# The estimator tells a multicast from a reduction by this name in the trace.
_sum.__name__ = "flood"
_multicast = jax.jit(_sum, static_argnames="names")


def cost(height: int, width: int, words: float) -> Cost:
    """`B + M + N - 2 + 2 T_R + 1` cycles from a corner of M x N PEs to all; a line is 1 x N."""
    return Cost(contention=words, energy=0, links=1, distance=height + width - 2, depth=1)
