"""This file is how PEs along an axis talk in JAX's own words, on one device or spread over several.

A virtual axis is one of `jax.vmap`. Where its PEs are spread over devices, each holds a block of
neighbors: the axis is then one of the mesh (`wafer.axes.SPREAD`), outermost, and one of vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.wafer.axes import SPREAD


def virtual() -> bool:
    """Whether this trace is of virtual PEs."""
    # Asked of JAX, not of the wafer: it holds in a backward trace, where no wafer is in force.
    return set(_manual()) <= set(SPREAD.values())


def bound() -> tuple[str, ...]:
    """The axes whose PEs are devices, one each."""
    return tuple(name for name in _manual() if name not in SPREAD.values())


def devices_along(name: str) -> str | None:
    """The mesh axis whose devices have a block each of the PEs along `name`; None for one alone."""
    spread = SPREAD.get(str(name))
    return spread if spread in _manual() else None


def size(name: str) -> int:
    """How many PEs stand along `name`."""
    spread = devices_along(name)
    return lax.axis_size(name) * (lax.axis_size(spread) if spread else 1)


def index(name: str) -> jax.Array:
    """This PE's place along `name`, int32."""
    spread, place = devices_along(name), lax.axis_index(name)
    return lax.axis_index(spread) * lax.axis_size(name) + place if spread else place


def reduced(move: Callable, tile: jax.Array, names: Sequence[str]) -> jax.Array:
    """`tile` reduced over `names` by `lax.psum`, `pmax`, `pmin` or `pmean`."""
    if not virtual():
        return move(tile, tuple(names))
    for name in reversed(names):
        tile = move(tile, name)
    spread = tuple(s for s in map(devices_along, names) if s)  # one tile for each block is sent
    return move(tile, spread) if spread else tile


def gathered(tile: jax.Array, name: str, axis: int, kind: str) -> jax.Array:
    """All PEs' tiles, joined along dimension `axis`; `kind` is `lax.all_gather`'s `to`."""
    tile = lax.all_gather(tile, name, axis=axis, tiled=True, to=kind)
    spread = devices_along(name)
    return lax.all_gather(tile, spread, axis=axis, tiled=True, to=kind) if spread else tile


def scattered(tile: jax.Array, name: str, axis: int) -> jax.Array:
    """The sum of all PEs' tiles, of which this PE keeps its part of dimension `axis`."""
    spread = devices_along(name)
    if spread is None:
        return lax.psum_scatter(tile, name, scatter_dimension=axis, tiled=True)
    parts = _dealt(tile, name, spread, axis)
    parts = lax.psum_scatter(parts, name, scatter_dimension=1, tiled=True)
    parts = lax.psum_scatter(parts, spread, scatter_dimension=0, tiled=True)
    return parts[0, 0]


def exchanged(tile: jax.Array, name: str, split: int, concat: int) -> jax.Array:
    """Parts of dimension `split` sent to all PEs, those received joined along `concat`."""
    spread = devices_along(name)
    if spread is None:
        return lax.all_to_all(tile, name, split, concat, tiled=True)
    parts = _dealt(tile, name, spread, split)
    parts = lax.all_to_all(parts, spread, 0, 0, tiled=True)
    parts = lax.all_to_all(parts, name, 1, 1, tiled=True)
    parts = jnp.moveaxis(parts, (0, 1), (concat, concat + 1))
    shape = parts.shape
    return parts.reshape(*shape[:concat], -1, *shape[concat + 3 :])


def _dealt(tile: jax.Array, name: str, spread: str, axis: int) -> jax.Array:
    """`[devices, PEs of a block, *part]`, the part of dimension `axis` of each PE."""
    shape, counts = tile.shape, (lax.axis_size(spread), lax.axis_size(name))
    parts = tile.reshape(*shape[:axis], *counts, -1, *shape[axis + 1 :])
    return jnp.moveaxis(parts, (axis, axis + 1), (0, 1))


def _manual() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
