"""JAX's own collectives along one axis of PEs: devices, virtual PEs, or virtual PEs on devices.

A virtual axis is an axis of `jax.vmap`. When its PEs are spread over devices, each device holds a
block of neighbors. The axis is then two axes for JAX: one of the mesh (`wafer.axes.SPREAD`), which
is the outer one, and one of vmap.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Shaped

from wsekern.wafer.axes import SPREAD


def is_virtual() -> bool:
    """Whether the PEs of this trace are virtual."""
    # JAX is asked, not the wafer: a backward trace has no wafer in force.
    return set(_manual_axes()) <= set(SPREAD.values())


def device_axes() -> tuple[str, ...]:
    """The axes along which every PE is a device of its own."""
    return tuple(name for name in _manual_axes() if name not in SPREAD.values())


def spread_axis(name: str) -> str | None:
    """The mesh axis over which the PEs along `name` are spread in blocks; None if they are not."""
    mesh_axis = SPREAD.get(str(name))
    return mesh_axis if mesh_axis in _manual_axes() else None


def size(name: str) -> int:
    """How many PEs stand along `name`."""
    mesh_axis = spread_axis(name)
    return lax.axis_size(name) * (lax.axis_size(mesh_axis) if mesh_axis else 1)


def index(name: str) -> Int32[Array, ""]:
    """This PE's place along `name`."""
    mesh_axis, place = spread_axis(name), lax.axis_index(name)
    return lax.axis_index(mesh_axis) * lax.axis_size(name) + place if mesh_axis else place


def reduce_over(
    collective: Callable, tile: Shaped[Array, "..."], names: Sequence[str]
) -> Shaped[Array, "..."]:
    """`tile` reduced over the axes `names` by `collective`: `lax.psum`, `pmax`, `pmin`, `pmean`."""
    if not is_virtual():
        return collective(tile, tuple(names))
    # vmap has no rule for a reduction over several of its axes at once.
    for name in reversed(names):
        tile = collective(tile, name)
    # Within a block the tiles are reduced by now, so that a device sends one.
    mesh_axes = tuple(axis for axis in map(spread_axis, names) if axis)
    return collective(tile, mesh_axes) if mesh_axes else tile


def all_gather(tile: Shaped[Array, "..."], name: str, axis: int, kind: str) -> Shaped[Array, "..."]:
    """All PEs' tiles, joined along dimension `axis`; `kind` is `lax.all_gather`'s `to`."""
    tile = lax.all_gather(tile, name, axis=axis, tiled=True, to=kind)
    mesh_axis = spread_axis(name)
    return lax.all_gather(tile, mesh_axis, axis=axis, tiled=True, to=kind) if mesh_axis else tile


def reduce_scatter(tile: Shaped[Array, "..."], name: str, axis: int) -> Shaped[Array, "..."]:
    """This PE's part, along dimension `axis`, of the sum of all PEs' tiles."""
    mesh_axis = spread_axis(name)
    if mesh_axis is None:
        return lax.psum_scatter(tile, name, scatter_dimension=axis, tiled=True)
    parts = _parts_by_pe(tile, name, mesh_axis, axis)
    # The sum within a block comes first: it is local, and leaves less to send.
    parts = lax.psum_scatter(parts, name, scatter_dimension=1, tiled=True)
    parts = lax.psum_scatter(parts, mesh_axis, scatter_dimension=0, tiled=True)
    return parts[0, 0]


def all_to_all(
    tile: Shaped[Array, "..."], name: str, split: int, concat: int
) -> Shaped[Array, "..."]:
    """One part of dimension `split` sent to each PE; the parts received, joined along `concat`."""
    mesh_axis = spread_axis(name)
    if mesh_axis is None:
        return lax.all_to_all(tile, name, split, concat, tiled=True)
    parts = _parts_by_pe(tile, name, mesh_axis, split)
    parts = lax.all_to_all(parts, mesh_axis, 0, 0, tiled=True)
    parts = lax.all_to_all(parts, name, 1, 1, tiled=True)
    # [devices, PEs of a block, *part]: the two leading dimensions, the senders in order, move in
    # front of `concat` and merge with it.
    parts = jnp.moveaxis(parts, (0, 1), (concat, concat + 1))
    shape = parts.shape
    return parts.reshape(*shape[:concat], -1, *shape[concat + 3 :])


def _parts_by_pe(
    tile: Shaped[Array, "..."], name: str, mesh_axis: str, axis: int
) -> Shaped[Array, "devices block ..."]:
    """Dimension `axis` of a tile cut into one part a PE."""
    shape, counts = tile.shape, (lax.axis_size(mesh_axis), lax.axis_size(name))
    parts = tile.reshape(*shape[:axis], *counts, -1, *shape[axis + 1 :])
    return jnp.moveaxis(parts, (axis, axis + 1), (0, 1))


def _manual_axes() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
