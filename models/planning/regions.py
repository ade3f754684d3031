"""Cut a wafer into square regions; each stores some of a model's layers.

A token passes from region to region as through a pipeline, and on to the next wafer. A model takes
as many regions as store it; the fewer PEs a region has, the more regions it takes.
"""

from __future__ import annotations

import dataclasses

from wsekern.hardware import Machine


@dataclasses.dataclass(frozen=True)
class Regions:
    """`down x across` squares of `side x side` PEs on one wafer."""

    side: int
    down: int
    across: int

    @property
    def count(self) -> int:
        """Regions of one wafer."""
        return self.down * self.across

    def __str__(self) -> str:
        return f"{self.down}x{self.across} regions of {self.side}x{self.side} PEs"


def candidates(machine: Machine, most: int = 6) -> list[Regions]:
    """Ways to cut a wafer into squares that leave few PEs unused, with at most `most` in a row."""
    height, width = machine.usable_height, machine.usable_width
    sides = {width // n for n in range(1, most + 1)} | {height // n for n in range(1, most + 1)}
    sides = {side for side in sides if side <= min(height, width)}
    by_grid: dict[tuple[int, int], Regions] = {}
    for side in sorted(sides):  # of several sides that give the same grid, the largest stays
        grid = height // side, width // side
        if grid[1] <= most:
            by_grid[grid] = Regions(side, *grid)
    return sorted(by_grid.values(), key=lambda r: r.count)


def of_side(machine: Machine, side: int) -> Regions:
    """As many squares of `side x side` PEs as a wafer has room for.

    Raises:
      ValueError: the wafer has room for none.
    """
    most = min(machine.usable_height, machine.usable_width)
    if not 1 <= side <= most:
        raise ValueError(
            f"side={side}: a square region of {machine.name} has from 1 to {most} PEs a side"
        )
    return Regions(side, machine.usable_height // side, machine.usable_width // side)
