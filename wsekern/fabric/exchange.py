"""This file is what all PEs of a line send to all others: gathers, scatters, all-to-all.

These are XLA's own collectives on every backend; only how they are asked for differs.
"""

from typing import Any

import jax
import jax.numpy as jnp

from wsekern.fabric import jax_collectives
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.fabric.moves import Along, axis_index, axis_size, names_of, varying


def all_gather(x: Any, along: Along, axis: int = 0, *, replicated: bool = False) -> Any:
    """All PEs' tiles along `along`, joined in order along dimension `axis`, on every PE.

    A PE receives all the others' words, and holds as many copies of a tile as there are PEs.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several (the first outermost).
      axis: the dimension of the tile that grows.
      replicated: whether JAX shall know that every PE now holds the same, so that it may leave the
        kernel through a spec that does not name `along`.
    """
    kind = "invarying" if replicated and not is_virtual() else "varying"
    for name in reversed(names_of(along)):  # the innermost neighbors are joined first
        x = jax.tree.map(lambda t, n=name: _gather(t, n, axis, kind), x)
    return x


def reduce_scatter(x: Any, along: Along, axis: int = 0) -> Any:
    """`x` summed over `along`, of which this PE keeps its own part of dimension `axis`.

    The inverse layout of `all_gather`, and its gradient.

    Raises:
      ValueError: dimension `axis` does not divide by the PEs along `along`.
    """
    _check_parts("reduce_scatter", x, along, axis)
    for name in names_of(along):
        x = jax.tree.map(
            lambda t, n=name: jax_collectives.reduce_scatter(varying(t, along), n, axis % t.ndim), x
        )
    return x


def all_to_all(x: Any, along: str, split: int, concat: int) -> Any:
    """Dimension `split` of `x` dealt out to the PEs along `along`, what comes joined at `concat`.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      split: the dimension whose parts go to different PEs.
      concat: the dimension along which the parts received are joined, in order of sender.

    Raises:
      ValueError: dimension `split` does not divide by the PEs along `along`.
    """
    _check_parts("all_to_all", x, along, split)
    for name in names_of(along):
        # Of an operand that is the same on all PEs, vmap's all_to_all has the wrong shape.
        x = jax.tree.map(
            lambda t, n=name: jax_collectives.all_to_all(
                varying(t, along), n, split % t.ndim, concat % t.ndim
            ),
            x,
        )
    return x


def scatter(x: Any, along: Along, axis: int = 0, root: int = 0) -> Any:
    """The root's `x`, of which this PE gets its own part of dimension `axis`; one step.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several (the first outermost).
      axis: the dimension that is dealt out.
      root: the place of the sender (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid, or dimension `axis` does not divide by the PEs.
    """
    check_root("scatter", along, root)
    mine = axis_index(along) == root
    kept = jax.tree.map(lambda tile: jnp.where(mine, tile, jnp.zeros((), tile.dtype)), x)
    return reduce_scatter(kept, along, axis)


def gather(x: Any, along: Along, axis: int = 0, root: int = 0) -> Any:
    """All PEs' tiles, joined in order along dimension `axis`, on the root; zeros elsewhere.

    What a PE holds has one shape on all of them: room for as many tiles as there are PEs.

    Raises:
      ValueError: `root` is outside the grid.
    """
    check_root("gather", along, root)
    mine = axis_index(along) == root
    whole = all_gather(x, along, axis)
    return jax.tree.map(lambda tile: jnp.where(mine, tile, jnp.zeros((), tile.dtype)), whole)


def check_root(what: str, along: Along, root: int) -> None:
    """Raises ValueError where there is no PE at the place `root`."""
    size = axis_size(along)
    if not 0 <= root < size:
        raise ValueError(f"fabric.{what}: root={root} is outside 0 to {size - 1} along {along!r}")


def _gather(tile: jax.Array, name: str, axis: int, kind: str) -> jax.Array:
    tile = varying(tile, name) if is_virtual() else tile
    return jax_collectives.all_gather(tile, name, axis % tile.ndim, kind)


def _check_parts(what: str, x: Any, along: Along, axis: int) -> None:
    size = axis_size(along)
    for tile in jax.tree.leaves(x):
        if tile.shape[axis] % size:
            raise ValueError(
                f"fabric.{what}: dimension {axis} of a tile of shape {tile.shape} does not divide "
                f"by the {size} PEs along {along!r}"
            )
