"""This file is square regions of a wafer, each of which holds some of a model's layers.

A token goes from region to region, as through a pipeline; over several wafers, on to the next. So a
model takes regions enough to hold it, and the fewer PEs a region has, the more of them there are.
"""

from __future__ import annotations

import dataclasses

from wsekern.hardware import Machine


@dataclasses.dataclass(frozen=True)
class Regions:
    """`down x across` squares of `side x side` PEs, side by side on one wafer."""

    side: int
    down: int
    across: int

    @property
    def count(self) -> int:
        """Of one wafer."""
        return self.down * self.across

    def __str__(self) -> str:
        return f"{self.down}x{self.across} regions of {self.side}x{self.side} PEs"


def candidates(machine: Machine, most: int = 6) -> list[Regions]:
    """The ways to cut a wafer into squares that leave little of it, up to `most` in a row."""
    height, width = machine.usable_height, machine.usable_width
    sides = {width // n for n in range(1, most + 1)} | {height // n for n in range(1, most + 1)}
    sides = {side for side in sides if side <= min(height, width)}
    found: dict[tuple[int, int], Regions] = {}
    for side in sorted(sides):  # of equally many regions, the largest
        grid = height // side, width // side
        if grid[1] <= most:
            found[grid] = Regions(side, *grid)
    return sorted(found.values(), key=lambda r: r.count)


def of_side(machine: Machine, side: int) -> Regions:
    """As many squares of one size as a wafer has room for.

    Raises:
      ValueError: it has room for none.
    """
    most = min(machine.usable_height, machine.usable_width)
    if not 1 <= side <= most:
        raise ValueError(
            f"side={side}: a square region of {machine.name} has from 1 to {most} PEs a side"
        )
    return Regions(side, machine.usable_height // side, machine.usable_width // side)
