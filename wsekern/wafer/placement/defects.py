"""`Defects`: which PEs of a physical wafer do not work.

A wafer is made with more cores than its programs see, and its fabric is routed around those that
fail: S. Lie, "Wafer Scale Deep Learning", Hot Chips 31, 2019; J. Wang, "100x Defect Tolerance", the
vendor's blog, 2025.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool

from wsekern.hardware import Machine
from wsekern.wafer.placement.frozen_array import FrozenArray


@dataclasses.dataclass(frozen=True)
class Defects:
    """A map of the physical PEs that are faulty; immutable, equal by value.

    Make one with `Defects.random` or `Defects.of`. What is faulty is a core. Its router, or the
    redundant links beside it, still pass words on, at one hop a place.
    """

    held: FrozenArray

    @classmethod
    def random(
        cls, machine: Machine | tuple[int, int], pe_yield: float = 0.99, seed: int = 0
    ) -> "Defects":
        """A map on which each PE is faulty with probability `1 - pe_yield`, independently.

        Args:
          machine: its physical grid is taken, spare columns included; or give (height, width).
          pe_yield: the share of PEs that work, 0 to 1.
          seed: of numpy's generator; the same seed gives the same map.

        Raises:
          ValueError: `pe_yield` is not from 0 to 1, or the grid is not positive.
        """
        if not 0 <= pe_yield <= 1:
            raise ValueError(f"Defects.random: pe_yield={pe_yield} must be from 0 to 1")
        shape = machine.physical if isinstance(machine, Machine) else machine
        if min(shape) < 1:
            raise ValueError(f"Defects.random: a grid of {shape[0]}x{shape[1]} has no PE")
        return cls(FrozenArray(np.random.default_rng(seed).random(shape) >= pe_yield))

    @classmethod
    def of(cls, faulty: Any) -> "Defects":
        """The map that you give.

        Args:
          faulty: [rows, columns] of the physical PEs; true or nonzero where one is faulty.

        Raises:
          ValueError: it is not two-dimensional, or has no PE.
        """
        array = np.asarray(faulty)
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"Defects.of: faulty has shape {array.shape}; it must be [rows, columns] of the "
                "physical PEs"
            )
        return cls(FrozenArray(array.astype(np.bool_)))

    @property
    def faulty(self) -> Bool[np.ndarray, "rows columns"]:
        """[rows, columns], true where a PE is faulty; read-only."""
        return self.held.array

    @property
    def shape(self) -> tuple[int, int]:
        """How many physical rows and columns there are."""
        rows, columns = self.faulty.shape
        return rows, columns

    @property
    def count(self) -> int:
        """How many PEs are faulty."""
        return int(self.faulty.sum())

    def turned(self) -> "Defects":
        """The map with rows and columns exchanged: a program may lie on the wafer either way."""
        return Defects(FrozenArray(self.faulty.T))

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<Defects {self.count:,} of {rows}x{columns} PEs>"
