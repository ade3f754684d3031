"""This file is `Defects`: which PEs of a physical wafer do not work.

A wafer is made with more cores than its programs see, and its fabric is routed round those that
fail: S. Lie, "Wafer Scale Deep Learning", Hot Chips 31, 2019; J. Wang, "100x Defect Tolerance", the
vendor's blog, 2025.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wsekern.hardware import Machine
from wsekern.wafer.placement.frozen_array import Held


@dataclasses.dataclass(frozen=True)
class Defects:
    """A map of the physical PEs that are faulty; immutable, equal by value.

    Make one with `Defects.random` or `Defects.of`. What is faulty is a core: its router, or the
    redundant links beside it, still pass words on, at one hop a place.
    """

    held: Held

    @classmethod
    def random(
        cls, machine: Machine | tuple[int, int], pe_yield: float = 0.99, seed: int = 0
    ) -> Defects:
        """Every PE faulty on its own, with probability `1 - pe_yield`.

        Args:
          machine: whose physical grid, spare columns with it; or (height, width) of a grid.
          pe_yield: the share of PEs that work, 0 to 1.
          seed: of numpy's generator; the same seed is the same map.

        Raises:
          ValueError: `pe_yield` is not from 0 to 1, or the grid is not positive.
        """
        if not 0 <= pe_yield <= 1:
            raise ValueError(f"Defects.random: pe_yield={pe_yield} must be from 0 to 1")
        shape = machine.physical if isinstance(machine, Machine) else machine
        if min(shape) < 1:
            raise ValueError(f"Defects.random: a grid of {shape[0]}x{shape[1]} has no PE")
        return cls(Held(np.random.default_rng(seed).random(shape) >= pe_yield))

    @classmethod
    def of(cls, faulty: np.ndarray) -> Defects:
        """The map given.

        Args:
          faulty: of the physical PEs, [rows, columns], true or nonzero where one is faulty.

        Raises:
          ValueError: it is not two-dimensional, or has no PE.
        """
        array = np.asarray(faulty)
        if array.ndim != 2 or not array.size:
            raise ValueError(
                f"Defects.of: faulty has shape {array.shape}; it must be [rows, columns] of the "
                "physical PEs"
            )
        return cls(Held(array.astype(np.bool_)))

    @property
    def faulty(self) -> np.ndarray:
        """[rows, columns], true where a PE is faulty; read-only."""
        return self.held.array

    @property
    def shape(self) -> tuple[int, int]:
        """Physical rows and columns."""
        rows, columns = self.faulty.shape
        return rows, columns

    @property
    def count(self) -> int:
        """How many PEs are faulty."""
        return int(self.faulty.sum())

    def turned(self) -> Defects:
        """The map with rows as columns: a program may lie on the wafer either way."""
        return Defects(Held(self.faulty.T))

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"<Defects {self.count:,} of {rows}x{columns} PEs>"
