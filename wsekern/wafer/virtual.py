"""Virtual PEs: nested `jax.vmap`, one for each axis of the grid, on one device or on several.

Every dimension is split into (grid, tile), and the kernel runs under one `jax.vmap` with an axis
name for each axis of the grid. Where virtual PEs are spread over devices, each device does this
with its own block of PEs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from wsekern.wafer import context, on_devices
from wsekern.wafer.axes import AXES, COLS, ROWS, SPREAD, WAFERS, axes_of
from wsekern.wafer.specs import Specs, broadcast_specs, named_axes

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_CALLED = {WAFERS: "wafers", ROWS: "height", COLS: "width"}


def map_on_virtual_pes(wafer: Wafer, kernel: Callable, specs: Specs, check: bool) -> Callable:
    del check  # nothing to turn off: index 0 is taken of a replicated result
    sizes = {axis: wafer.axis_size(axis) // wafer.devices_along(axis) for axis in wafer.axes}

    def block(specs, *operands):
        flat, tree = jax.tree.flatten(operands)
        in_specs = broadcast_specs(specs.in_specs, operands, "in_specs")
        split = [_split(sizes, a, s) for a, s in zip(flat, in_specs, strict=True)]

        def per_pe(*tiles: Any) -> Any:
            with context.within(wafer):
                return kernel(*jax.tree.unflatten(tree, tiles))

        run: Callable = per_pe
        for axis in reversed(wafer.axes):  # the outermost axis is mapped last
            mapped = tuple(0 if axis in named_axes(s) else None for s in in_specs)
            run = jax.vmap(run, mapped, 0, axis_name=axis, axis_size=sizes[axis])
        results = run(*split)
        out_specs = broadcast_specs(specs.out_specs, results, "out_specs")
        flat, tree = jax.tree.flatten(results)
        joined = [_join(sizes, a, s) for a, s in zip(flat, out_specs, strict=True)]
        return jax.tree.unflatten(tree, joined)

    if wafer.mesh is None:
        return functools.partial(block, specs)
    return functools.partial(_spread, wafer, block, specs)


def device_grid(devices: Any) -> tuple[int, int, int]:
    """Rows, columns and wafers of devices, of `(rows, columns)` or `(wafers, rows, columns)`.

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
    return rows, columns, wafers


def mesh_over(over: Wafer, wafer: Wafer) -> Mesh:
    """The mesh over whose devices the PEs of the virtual `wafer` are spread.

    Raises:
      ValueError: the devices are not those of `over` alone, or the PEs do not divide by them.
    """
    if over.backend != "devices" or not isinstance(over.mesh, Mesh):
        raise ValueError(f"Wafer.virtual: devices={over!r} is no wafer of devices")
    ours = [axis for axis in AXES if over.axis_name(axis) is not None]
    theirs = [over.axis_name(axis) for axis in ours]
    if over.mesh.size != over.size:
        raise ValueError(
            f"Wafer.virtual: the mesh of devices={over!r} has axes beside {theirs}; take a mesh of "
            "those alone"
        )
    for axis in AXES:
        _check_divides(axis, wafer.axis_size(axis), over.axis_size(axis))
    names = list(over.mesh.axis_names)
    order = [names.index(name) for name in theirs] + [
        i for i, name in enumerate(names) if name not in theirs
    ]
    sizes = [over.axis_size(axis) for axis in wafer.axes]
    placed = over.mesh.devices.transpose(order).reshape(sizes)
    spread = tuple(SPREAD[axis] for axis in wafer.axes)
    return Mesh(placed, spread, axis_types=(AxisType.Auto,) * len(spread))


def _spread(wafer: Wafer, block: Callable, specs: Specs, *operands: Any) -> Any:
    """`block` of each device's PEs, on all devices."""
    # A device's block is one stretch of a dimension only where that lies along one axis.
    apart = Specs.of(*(jax.tree.map(_apart, s) for s in (specs.in_specs, specs.out_specs)))
    flat, tree = jax.tree.flatten(operands)
    in_specs = broadcast_specs(specs.in_specs, operands, "in_specs")
    cut = [_cut_apart(wafer, a, s) for a, s in zip(flat, in_specs, strict=True)]
    # No check of replication: it knows nothing of vmap's axes.
    run = on_devices.run_on_devices(wafer, functools.partial(block, apart), apart, check=False)
    results = run(*jax.tree.unflatten(tree, cut))
    out_specs = broadcast_specs(specs.out_specs, results, "out_specs")
    flat, tree = jax.tree.flatten(results)
    whole = [_put_together(a, s) for a, s in zip(flat, out_specs, strict=True)]
    return jax.tree.unflatten(tree, whole)


def _apart(spec: P) -> P:
    """`spec` with an entry of its own for each axis."""
    return P(*(axis for entry in spec for axis in axes_of(entry) or (None,)))


def _cut_apart(wafer: Wafer, array: jax.Array, spec: P) -> jax.Array:
    shape: list[int] = []
    for d, length in enumerate(jnp.shape(array)):
        *outer, _ = axes_of(spec[d]) or (None,) if d < len(spec) else (None,)
        counts = [wafer.axis_size(axis) for axis in outer]
        shape += [*counts, length // math.prod(counts)]
    return jnp.reshape(array, shape)


def _put_together(array: jax.Array, spec: P) -> jax.Array:
    shape, rest = [], list(array.shape)
    for entry in spec:
        axes = len(axes_of(entry)) or 1
        shape.append(math.prod(rest[:axes]))
        rest = rest[axes:]
    return array.reshape(*shape, *rest)


def _split(along: dict[str, int], array: jax.Array, spec: P) -> jax.Array:
    """`array` with one leading dimension for each axis of the grid that `spec` names."""
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


def _join(along: dict[str, int], blocks: jax.Array, spec: P) -> jax.Array:
    """The whole array from blocks with one leading dimension for every axis of the grid."""
    named = named_axes(spec)
    if len(spec) > blocks.ndim - len(along):
        raise ValueError(
            f"Wafer.map: a result of a PE has {blocks.ndim - len(along)} dimensions, its spec "
            f"{spec} has {len(spec)}"
        )
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
            f"Wafer.virtual: {_CALLED[axis]}={pes} does not divide by the {devices} devices along "
            f"{axis!r}; take {' or '.join(map(str, near))}, or other devices"
        )
