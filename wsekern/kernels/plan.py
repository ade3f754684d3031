"""This file is what a stencil shall do, and how many steps one exchange serves."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wsekern.kernels.boundary import Pairs
from wsekern.kernels.lines import Line

# One exchange on emulated devices costs as much time as the update of so many cells: 50 to 90 us a
# collective, of which there are two a dimension, at about a cell a nanosecond.
_CELLS_OF_AN_EXCHANGE = 150_000
_DEEPEST = 8  # beyond, the unrolled program only takes longer to compile


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
        return self.depth == 1 and self.on_wafer

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


def steps_to_an_exchange(lines: Sequence[Line], radius: Pairs, most: int, on_wafer: bool) -> int:
    """How many steps one exchange shall serve, by the time of an exchange and of a cell.

    On a wafer, virtual or abstract, a neighbor is two cycles away and nothing is gained by
    computing its cells too.
    """
    split = [i for i, line in enumerate(lines) if line.parts > 1 and max(radius[i])]
    if on_wafer and split:
        return 1
    if not split:
        return 2  # nothing is sent, and two steps are what the buffers need to take turns

    def cost(k: int) -> float:
        cells = [
            math.prod(
                line.tile + ((k - 1 - j) * sum(radius[d]) if d in split else 0)
                for d, line in enumerate(lines)
            )
            for j in range(k)
        ]
        return (_CELLS_OF_AN_EXCHANGE * len(split) + sum(cells)) / k

    # Even ones: after them the fields lie in the buffer where they began. Of a halo of one cell XLA
    # copies the whole buffer at each exchange, so one step at a time is for tiles that need it.
    depths = [k for k in (2, 4, 6, _DEEPEST) if k <= most]
    return min(depths, key=cost, default=1)
