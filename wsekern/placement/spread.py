"""This file is how virtual PEs are spread over devices: which device has which block of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import AxisType, Mesh

from wsekern.axes import AXES, COLS, ROWS, SPREAD, WAFERS

if TYPE_CHECKING:
    from wsekern.wafer import Wafer

_CALLED = {WAFERS: "wafers", ROWS: "height", COLS: "width"}


def grid(devices: Any) -> tuple[int, int, int]:
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
    if over.reading != "devices" or not isinstance(over.mesh, Mesh):
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


def part(of: dict[str, tuple[int, int]], wafer: Wafer) -> dict[str, tuple[int, int]]:
    """The (start, length) of devices along each mesh axis that hold those PEs of `wafer`.

    Raises:
      ValueError: a device holds some of them, but not all of its block.
    """
    found = {}
    for axis, (begin, length) in of.items():
        block = wafer.axis_size(axis) // wafer.devices_along(axis)
        if wafer.mesh is not None and (begin % block or length % block):
            raise ValueError(
                f"Wafer.region: {length} PEs from {begin} on along {axis!r} are no whole blocks of "
                f"the {block} that each device of {wafer!r} has; make the wafer without devices="
            )
        found[SPREAD[axis]] = begin // block, length // block
    return found


def _check_divides(axis: str, pes: int, devices: int) -> None:
    if pes % devices:
        near = sorted({max(pes // devices, 1) * devices, -(-pes // devices) * devices})
        raise ValueError(
            f"Wafer.virtual: {_CALLED[axis]}={pes} does not divide by the {devices} devices along "
            f"{axis!r}; take {' or '.join(map(str, near))}, or other devices"
        )
