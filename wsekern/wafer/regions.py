"""Sub-rectangles of a wafer: which PEs they hold, and the part of the mesh that they run on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from wsekern.wafer.axes import SPREAD

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

Stretch = tuple[int, int]  # where a run of PEs or devices along one axis begins, and its length


def check_region(y: int, x: int, height: int, width: int, wafer: "Wafer") -> None:
    """Raises ValueError if a region is not inside `wafer`."""
    positive = y >= 0 and x >= 0 and height >= 1 and width >= 1
    if not positive or y + height > wafer.height or x + width > wafer.width:
        raise ValueError(
            f"Wafer.region: {height}x{width} PEs from ({y}, {x}) on are not inside "
            f"{wafer.height}x{wafer.width}"
        )


def split_evenly(name: str, size: int, parts: int) -> list[Stretch]:
    """A line of `size` PEs cut into `parts` stretches whose lengths differ by one at most.

    The longer ones come first: 7 PEs in 3 parts are (0, 3), (3, 2), (5, 2).

    Raises:
      ValueError: there are fewer PEs than parts.
    """
    if not 1 <= parts <= size:
        raise ValueError(f"Wafer.split: {name}={parts} must be from 1 to the {size} PEs there")
    lengths = [size // parts + (i < size % parts) for i in range(parts)]
    starts = np.cumsum([0, *lengths[:-1]])
    return [(int(start), length) for start, length in zip(starts, lengths, strict=True)]


def devices_of_blocks(part: Mapping[str, Stretch], wafer: "Wafer") -> dict[str, Stretch]:
    """The devices, along each mesh axis, that hold the PEs `part` of a virtual wafer.

    Args:
      part: the PEs along each axis of the wafer.
      wafer: virtual; its PEs may be spread over devices in blocks.

    Raises:
      ValueError: a device holds some of these PEs, but not all of its block.
    """
    devices = {}
    for axis, (begin, length) in part.items():
        block = wafer.axis_size(axis) // wafer.devices_along(axis)
        if wafer.mesh is not None and (begin % block or length % block):
            raise ValueError(
                f"Wafer.region: {length} PEs from {begin} on along {axis!r} are no whole blocks of "
                f"the {block} that each device of {wafer!r} has; make the wafer without devices="
            )
        devices[SPREAD[axis]] = begin // block, length // block
    return devices


def submesh(
    mesh: Mesh | AbstractMesh | None, part: Mapping[str, Stretch]
) -> Mesh | AbstractMesh | None:
    """`mesh` cut, along each axis that `part` names, to that stretch; None stays None."""
    if mesh is None:
        return None
    names, types = mesh.axis_names, mesh.axis_types
    stretches = {name: (0, mesh.shape[name]) for name in names} | dict(part)
    if isinstance(mesh, AbstractMesh):
        sizes = tuple(stretches[name][1] for name in names)
        return AbstractMesh(sizes, names, axis_types=types)
    kept = tuple(slice(stretches[name][0], sum(stretches[name])) for name in names)
    return Mesh(mesh.devices[kept], names, axis_types=types)
