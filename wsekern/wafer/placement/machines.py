"""This file is which grids fit a machine, and where they lie on its physical wafer."""

from __future__ import annotations

from wsekern.hardware import Machine
from wsekern.wafer.placement.defects import Defects
from wsekern.wafer.placement.place import Placement, place


def check_fits(what: str, machine: Machine, height: int, width: int) -> None:
    """Raises ValueError where a grid is larger than what programs can use of a machine."""
    long, short = max(height, width), min(height, width)
    usable = (machine.usable_height, machine.usable_width)
    if long > max(usable) or short > min(usable):
        raise ValueError(
            f"{what}: {height}x{width} PEs do not fit {machine.name}, whose programs can use "
            f"{usable[0]}x{usable[1]}, either way round"
        )


def placed(
    machine: Machine, height: int, width: int, defects: Defects | None, folded: bool
) -> Placement | None:
    """Where the PEs of a grid lie; None where nothing is said of it: side by side.

    Raises:
      ValueError: the map of defects is larger than the wafer, or leaves no such rectangle.
    """
    if defects is None and not folded:
        return None
    defects = Defects.random(machine, 1.0) if defects is None else defects
    made = machine.physical
    if defects.shape[0] > made[0] or defects.shape[1] > made[1]:
        raise ValueError(
            f"defects: a map of {defects.shape[0]}x{defects.shape[1]} PEs is larger than "
            f"{machine.name}, which has {made[0]}x{made[1]}, those in reserve with them"
        )
    return place(defects, height, width, folded)
