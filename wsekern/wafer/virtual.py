"""Virtual PEs: nested `jax.vmap`, one for each axis of the grid, on one device or on several.

Every dimension of an array is split into (grid, tile). The kernel then runs under one `jax.vmap`,
with an axis name, for each axis of the grid. If virtual PEs are spread over devices, each device
does this with its own block of PEs.

    [6, 4] with P("y", "x") on 3x2 PEs  ->  [3, 2, 2, 2]  ->  [3, 2 | 2, 2]: y, x and the tile
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.wafer import context, on_devices
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.specs import Specs, broadcast_specs, named_axes

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_ARGUMENTS = {WAFERS: "wafers", ROWS: "height", COLS: "width"}


def map_on_virtual_pes(wafer: "Wafer", kernel: Callable, specs: Specs, check: bool) -> Callable:
    """`kernel` of one PE's tiles as a function of whole arrays, all PEs under `jax.vmap`."""
    del check  # there is none to turn off: of a replicated result, index 0 is taken
    sizes = {axis: wafer.axis_size(axis) // wafer.devices_along(axis) for axis in wafer.axes}

    def run_block(kernel: Callable, specs: Specs, *operands: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        in_specs = broadcast_specs(specs.in_specs, operands, "in_specs")
        split = [_split(sizes, a, s) for a, s in zip(leaves, in_specs, strict=True)]

        def per_pe(*tiles: Any) -> Any:
            with context.within(wafer):
                return kernel(*jax.tree.unflatten(tree, tiles))

        run: Callable = per_pe
        for axis in reversed(wafer.axes):  # the outermost axis is mapped last
            mapped = tuple(0 if axis in named_axes(s) else None for s in in_specs)
            run = jax.vmap(run, mapped, 0, axis_name=axis, axis_size=sizes[axis])
        results = run(*split)
        out_specs = broadcast_specs(specs.out_specs, results, "out_specs")
        leaves, tree = jax.tree.flatten(results)
        joined = [_join(sizes, a, s) for a, s in zip(leaves, out_specs, strict=True)]
        return jax.tree.unflatten(tree, joined)

    if wafer.mesh is None:
        return functools.partial(run_block, kernel, specs)
    return functools.partial(_run_spread, wafer, run_block, kernel, specs)


def device_grid(devices: Any) -> tuple[int, int, int]:
    """(wafers, rows, columns) of devices, from `(rows, columns)` or `(wafers, rows, columns)`.

    Raises:
      ValueError: it is neither.
    """
    counts = devices if isinstance(devices, tuple) else ()
    if len(counts) not in (2, 3) or not all(isinstance(n, int | np.integer) for n in counts):
        raise ValueError(
            f"Wafer.virtual: devices={devices!r} must be (rows, columns) or (wafers, rows, "
            "columns) of devices, or a wafer made by Wafer.devices"
        )
    wafers, rows, columns = (1, *counts)[-3:]
    return wafers, rows, columns


def mesh_over(over: "Wafer", wafer: "Wafer") -> Mesh:
    """The mesh over whose devices the PEs of the virtual `wafer` are spread.

    Raises:
      ValueError: `over` is not a wafer of devices, its mesh has other axes beside the wafer's, or
        the PEs do not divide by its devices.
    """
    if over.backend != "devices" or not isinstance(over.mesh, Mesh):
        raise ValueError(f"Wafer.virtual: devices={over!r} is no wafer of devices")
    mesh_names = [over.axis_name(axis) for axis in AXES if over.axis_name(axis) is not None]
    if over.mesh.size != over.size:
        raise ValueError(
            f"Wafer.virtual: the mesh of devices={over!r} has axes beside {mesh_names}; take a "
            "mesh of those alone"
        )
    for axis in AXES:
        _check_divides(axis, wafer.axis_size(axis), over.axis_size(axis))
    names = list(over.mesh.axis_names)
    order = [names.index(name) for name in mesh_names] + [
        i for i, name in enumerate(names) if name not in mesh_names
    ]
    sizes = [over.axis_size(axis) for axis in wafer.axes]
    placed = over.mesh.devices.transpose(order).reshape(sizes)
    spread = tuple(SPREAD[axis] for axis in wafer.axes)
    return Mesh(placed, spread, axis_types=(AxisType.Auto,) * len(spread))


def _run_spread(
    wafer: "Wafer", run_block: Callable, kernel: Callable, specs: Specs, *operands: Any
) -> Any:
    """`run_block` on every device, for the PEs of its block."""

    def per_pe(*tiles: Any) -> Any:
        leaves, tree = jax.tree.flatten(tiles)
        in_specs = broadcast_specs(specs.in_specs, tiles, "in_specs")
        tiles = jax.tree.unflatten(tree, map(_merge_axes, leaves, in_specs))
        results = kernel(*tiles)
        out_specs = broadcast_specs(specs.out_specs, results, "out_specs")
        leaves, tree = jax.tree.flatten(results)
        return jax.tree.unflatten(tree, map(_add_axes, leaves, out_specs))

    # If a dimension lies along several axes, a device's block is not one stretch of it: with
    # P(("y", "x")) the PEs of one column are far apart. So split it into one dimension an axis.
    one_axis = Specs.of(
        *(jax.tree.map(_one_axis_a_dimension, s) for s in (specs.in_specs, specs.out_specs))
    )
    leaves, tree = jax.tree.flatten(operands)
    in_specs = broadcast_specs(specs.in_specs, operands, "in_specs")
    split = [_split_axes(wafer, a, s) for a, s in zip(leaves, in_specs, strict=True)]
    # No check of replication: it knows nothing of vmap's axes.
    run = on_devices.run_on_devices(
        wafer, functools.partial(run_block, per_pe, one_axis), one_axis, check=False
    )
    results = run(*jax.tree.unflatten(tree, split))
    out_specs = broadcast_specs(specs.out_specs, results, "out_specs")
    leaves, tree = jax.tree.flatten(results)
    whole = [_merge_axes(a, s) for a, s in zip(leaves, out_specs, strict=True)]
    return jax.tree.unflatten(tree, whole)


def _one_axis_a_dimension(spec: P) -> P:
    """P(("y", "x"), None) becomes P("y", "x", None)."""
    return P(*(axis for entry in spec for axis in axes_of(entry) or (None,)))


def _split_axes(wafer: "Wafer", array: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """`array` with one dimension for each axis of `spec`: [8] with P(("y", "x")) becomes [2, 4]."""
    shape: list[int] = []
    for d, length in enumerate(jnp.shape(array)):
        *outer, _ = axes_of(spec[d]) or (None,) if d < len(spec) else (None,)
        counts = [wafer.axis_size(axis) for axis in outer]
        shape += [*counts, length // math.prod(counts)]
    return jnp.reshape(array, shape)


def _merge_axes(array: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """The inverse of `_split_axes`."""
    shape, lengths = [], list(array.shape)
    for entry in spec:
        axes = len(axes_of(entry)) or 1
        shape.append(math.prod(lengths[:axes]))
        lengths = lengths[axes:]
    return array.reshape(*shape, *lengths)


def _add_axes(tile: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """The inverse of `_merge_axes` for one PE's tile: [2] with P(("y", "x")) becomes [1, 2]."""
    shape: list[int] = []
    for d, length in enumerate(tile.shape):
        axes = axes_of(spec[d]) if d < len(spec) else ()
        shape += [*[1] * (len(axes) - 1), length]
    return tile.reshape(shape)


def _split(along: dict[str, int], array: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """`array` with one leading dimension for each axis of the grid that `spec` names.

    Args:
      along: PEs of this device along each axis, outermost first.
      array: whole on this device.
      spec: how it lies on the PEs.
    """
    sizes: list[int] = []
    leading: dict[str, int] = {}
    tile: list[int] = []
    for d, length in enumerate(jnp.shape(array)):
        entry = axes_of(spec[d]) if d < len(spec) else ()
        for axis in (a for a in entry if a in along):
            leading[axis] = len(sizes)
            sizes.append(along[axis])
            length //= along[axis]
        tile.append(len(sizes))
        sizes.append(length)
    order = [leading[axis] for axis in along if axis in leading]
    return jnp.reshape(array, sizes).transpose(*order, *tile)


def _join(along: dict[str, int], blocks: Shaped[Array, "..."], spec: P) -> Shaped[Array, "..."]:
    """The whole array from blocks with one leading dimension for every axis of the grid."""
    named = named_axes(spec)
    if len(spec) > blocks.ndim - len(along):
        raise ValueError(
            f"Wafer.map: a result of a PE has {blocks.ndim - len(along)} dimensions, its spec "
            f"{spec} has {len(spec)}"
        )
    # Along an axis that the spec does not name, all PEs return the same: take the first one's.
    blocks = blocks[tuple(slice(None) if axis in named else 0 for axis in along)]
    leading = [axis for axis in along if axis in named]
    order, shape = [], []
    for d, length in enumerate(blocks.shape[len(leading) :]):
        split = [a for a in (axes_of(spec[d]) if d < len(spec) else ()) if a in leading]
        order += [leading.index(axis) for axis in split] + [len(leading) + d]
        for axis in split:
            length *= along[axis]
        shape.append(length)
    return blocks.transpose(order).reshape(shape)


def _check_divides(axis: str, pes: int, devices: int) -> None:
    if pes % devices:
        near = sorted({max(pes // devices, 1) * devices, -(-pes // devices) * devices})
        raise ValueError(
            f"Wafer.virtual: {_ARGUMENTS[axis]}={pes} does not divide by the {devices} devices "
            f"along {axis!r}; take {' or '.join(map(str, near))}, or other devices"
        )
