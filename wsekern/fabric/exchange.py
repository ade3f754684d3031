"""Moves between all PEs of a line: gathers, scatters and all-to-all.

They are XLA's own collectives on every backend.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from wsekern.fabric import jax_collectives
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.fabric.moves import (
    Along,
    TileTree,
    axis_index,
    axis_size,
    names_of,
    shift,
    varying,
)


def all_gather(x: TileTree, along: Along, axis: int = 0, *, replicated: bool = False) -> TileTree:
    """All PEs' tiles along `along`, joined in order along dimension `axis`, on every PE.

    With P PEs and tiles of B words, a PE receives (P - 1) B words and then holds P B.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis, or several with the first outermost.
      axis: the dimension along which the tiles are joined.
      replicated: whether to type the result as the same on every PE, so that it may leave the
        kernel through a spec that does not name `along`.
    """
    kind = "invarying" if replicated and not is_virtual() else "varying"
    for name in reversed(names_of(along)):  # the innermost neighbors are joined first
        x = jax.tree.map(lambda t, n=name: _gather(t, n, axis, kind), x)
    return x


def ring_all_gather(x: TileTree, along: str, axis: int = 0) -> TileTree:
    """`all_gather` by shifts of the tiles around a ring, half of them one way and half the other.

    With P PEs and tiles of B words, a PE receives (P - 1) B words in P / 2 steps. Each shift is a
    move of its own. XLA lets moves go on behind arithmetic, also on chips where it waits for its
    own gathers.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      axis: the dimension along which the tiles are joined.
    """
    size, place = axis_size(along), axis_index(along)
    if size == 1:
        return x

    def put(whole: TileTree, tiles: TileTree, owner: Int[Array, ""]) -> TileTree:
        return jax.tree.map(
            lambda w, t: jax.lax.dynamic_update_slice_in_dim(
                w, t, owner * t.shape[axis], axis % t.ndim
            ),
            whole,
            tiles,
        )

    def empty(t: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        shape = [n * size if d == axis % t.ndim else n for d, n in enumerate(t.shape)]
        return varying(jax.lax.empty(tuple(shape), t.dtype), along)

    whole = put(jax.tree.map(empty, x), x, place)
    forth = back = x
    for step in range(1, size // 2 + 1):
        forth = shift(forth, along)
        whole = put(whole, forth, (place - step) % size)
        if 2 * step < size:
            back = shift(back, along, -1)
            whole = put(whole, back, (place + step) % size)
    return whole


def reduce_scatter(x: TileTree, along: Along, axis: int = 0) -> TileTree:
    """This PE's part, along dimension `axis`, of the sum of all PEs' `x`.

    It is the gradient of `all_gather`, and has the inverse layout. With P PEs and tiles of B words,
    a PE receives (P - 1) B / P words and keeps B / P.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis, or several with the first outermost.
      axis: the dimension that is split into one part a PE.

    Raises:
      ValueError: dimension `axis` does not divide by the PEs along `along`.
    """
    _check_parts("reduce_scatter", x, along, axis)
    for name in names_of(along):
        x = jax.tree.map(
            lambda t, n=name: jax_collectives.reduce_scatter(varying(t, along), n, axis % t.ndim), x
        )
    return x


def all_to_all(x: TileTree, along: str, split: int, concat: int) -> TileTree:
    """One part of `x` sent to each PE along `along`, and the parts received joined.

    With P PEs and tiles of B words, a PE receives (P - 1) B / P words.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      split: the dimension that is split into one part for each PE.
      concat: the dimension along which the parts received are joined, in order of sender.

    Raises:
      ValueError: dimension `split` does not divide by the PEs along `along`.
    """
    _check_parts("all_to_all", x, along, split)
    for name in names_of(along):
        # `varying`, because vmap's all_to_all has the wrong shape for an operand that is the same
        # on all PEs.
        x = jax.tree.map(
            lambda t, n=name: jax_collectives.all_to_all(
                varying(t, along), n, split % t.ndim, concat % t.ndim
            ),
            x,
        )
    return x


def scatter(x: TileTree, along: Along, axis: int = 0, root: int = 0) -> TileTree:
    """This PE's part, along dimension `axis`, of the root's `x`; one step.

    Args:
      x: a tile, or a pytree of tiles; only the root's counts.
      along: one axis, or several with the first outermost.
      axis: the dimension that is split into one part a PE.
      root: the place of the sender (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid, or dimension `axis` does not divide by the PEs.
    """
    check_root("scatter", along, root)
    is_root = axis_index(along) == root
    root_alone = jax.tree.map(lambda t: jnp.where(is_root, t, jnp.zeros((), t.dtype)), x)
    return reduce_scatter(root_alone, along, axis)


def gather(x: TileTree, along: Along, axis: int = 0, root: int = 0) -> TileTree:
    """All PEs' tiles, joined in order along dimension `axis`, on the root; zeros elsewhere.

    It is an `all_gather`, masked: with P PEs and tiles of B words, every PE receives (P - 1) B
    words, in one step along each axis. Every PE needs the memory of the result, P B words: a
    kernel's arrays have one shape on all PEs.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis, or several with the first outermost.
      axis: the dimension along which the tiles are joined.
      root: the place of the PE that gets the result (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid.
    """
    check_root("gather", along, root)
    is_root = axis_index(along) == root
    whole = all_gather(x, along, axis)
    return jax.tree.map(lambda t: jnp.where(is_root, t, jnp.zeros((), t.dtype)), whole)


def check_root(operation: str, along: Along, root: int) -> None:
    """Raises ValueError if no PE stands at the place `root`."""
    size = axis_size(along)
    if not 0 <= root < size:
        raise ValueError(
            f"fabric.{operation}: root={root} is outside 0 to {size - 1} along {along!r}"
        )


def _gather(tile: Shaped[Array, "..."], name: str, axis: int, kind: str) -> Shaped[Array, "..."]:
    tile = varying(tile, name) if is_virtual() else tile
    return jax_collectives.all_gather(tile, name, axis % tile.ndim, kind)


def _check_parts(operation: str, x: TileTree, along: Along, axis: int) -> None:
    size = axis_size(along)
    for tile in jax.tree.leaves(x):
        if tile.shape[axis] % size:
            raise ValueError(
                f"fabric.{operation}: dimension {axis} of a tile of shape {tile.shape} does not "
                f"divide by the {size} PEs along {along!r}"
            )
