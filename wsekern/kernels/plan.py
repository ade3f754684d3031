"""This file is what a stencil shall do, all of it static."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wsekern.kernels.boundary import Pairs
from wsekern.kernels.lines import Line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run, all of it static."""

    update: Callable[..., Any]
    tree: Any  # of the fields
    coefficients: Any  # their tree
    told_step: bool  # whether `update` takes `step=`
    lines: tuple[tuple[Line, ...], ...]  # for each field
    coefficient_lines: tuple[tuple[Line, ...] | None, ...]
    radius: Pairs
    steps: int
    depth: int  # steps from one exchange to the next
    corners: bool  # whether `update` reads them
    on_wafer: bool  # virtual or abstract PEs, where a step costs memory and not messages
    on_cpus: bool  # devices that are CPUs, whose compiler is told what to compute once
    overlaps: bool  # whether the inside of a tile is computed while its halo travels
    save_every: int | None
    checkpoint: str | None

    def call(self, fields: Any, coefficients: Any, step: Any) -> Any:
        """The user's update, with what it takes."""
        named = {"step": step} if self.told_step else {}
        if self.coefficients.num_leaves:
            return self.update(fields, coefficients, **named)
        return self.update(fields, **named)

    def coefficients_of(self, coefficients: Any) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(leaf) for leaf in jax.tree.leaves(coefficients))

    @property
    def unit(self) -> int:
        """Steps after which the two buffers have their places again: an even number of turns."""
        return self.depth * (1 + self.depth % 2)

    @property
    def joins(self) -> bool:
        """Whether a tile and its halo are joined anew in each step, instead of kept padded."""
        alone = self.steps == 1 and not self.overlaps and self.checkpoint is None
        return self.depth == 1 and (self.on_wafer or alone)

    @property
    def padding(self) -> Pairs:
        """Of a buffer: a deep halo where a dimension is split, else one step's."""
        return ((0, 0),) * len(self.radius) if self.joins else self.margins(self.depth)

    def margins(self, left: int) -> Pairs:
        """The cells around a tile that the next `left` steps need."""
        return tuple(
            (left * low, left * high) if line.parts > 1 else (low, high)
            for line, (low, high) in zip(self.lines[0], self.radius, strict=True)
        )

    def left(self, j: int, steps: int) -> int:
        """How many steps the halo shall still serve before the `j`th of `steps`."""
        return min(self.depth, steps - j // self.depth * self.depth) - j % self.depth

    def region(self, left: int) -> Pairs:
        """Begin and end of the cells, counted in the tile, that the next of `left` steps makes."""
        return tuple(
            (-low, line.tile + high) if line.parts > 1 else (0, line.tile)
            for line, (low, high) in zip(self.lines[0], self.margins(left - 1), strict=True)
        )

    def boxes(self, left: int) -> list[Pairs]:
        """The region in parts: first what reads the tile alone, then what needs its neighbors."""
        inside, rims = list(self.region(left)), []
        for dim, (line, (low, high)) in enumerate(zip(self.lines[0], self.radius, strict=True)):
            if line.parts == 1:
                continue
            begin, end = inside[dim]
            for cells in ((begin, low), (line.tile - high, end)):
                rims.append((*inside[:dim], cells, *inside[dim + 1 :]))
            inside[dim] = (low, line.tile - high)
        return [tuple(inside), *(rim for rim in rims if all(a < b for a, b in rim))]
