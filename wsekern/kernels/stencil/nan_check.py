"""Find where a field ceased to be finite: the field, the step and the cell.

Steps are not watched while they are taken, because that would cost each of them a look at every
cell. If the result is not finite, they are taken once more, one at a time, by a program that looks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from wsekern import fabric
from wsekern.kernels.stencil.buffers import Tile, Tiles
from wsekern.kernels.stencil.geometry import Lines
from wsekern.kernels.stencil.steps import StencilRun


def is_finite(arrays: PyTree[Shaped[Array, "..."]]) -> bool:
    """Whether all cells of all arrays are finite; waits for them."""
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(arrays))


def first_not_finite(run: StencilRun, tiles: Sequence[Tile], steps: int) -> Int[Array, "..."]:
    """`[1, ..., 2 + dimensions]`: this PE's first step, field and cell that is not finite; per PE.

    Steps count from 1; 0 means that the operands were not finite, and `steps + 1` that all is.
    """
    lines = run.plan.lines[0]
    # Of this PE's tile in the whole field, to report a cell by its place there.
    begins = [
        fabric.axis_index(line.axes) * line.tile if line.split else jnp.int32(0) for line in lines
    ]

    def look(
        first: Int[Array, " entries"], tiles: Tiles, step: Int[Array, ""]
    ) -> Int[Array, " entries"]:
        for i, tile in enumerate(tiles):
            bad = ~jnp.isfinite(tile) & _cells_of_field(tile.shape, lines, begins)
            cell = jnp.unravel_index(jnp.argmax(bad), tile.shape)
            place = [b + c for b, c in zip(begins, cell, strict=True)]
            new = jnp.stack([step, jnp.int32(i), *place]).astype(jnp.int32)
            # Once one is found, later ones are ignored: what is not finite spreads.
            first = jnp.where(jnp.any(bad) & (first[0] > steps), new, first)
        return first

    def one_step(
        carry: tuple[Tiles, Int[Array, " entries"]], step: Int[Array, ""]
    ) -> tuple[tuple[Tiles, Int[Array, " entries"]], None]:
        tiles, first = carry
        tiles, _ = run.advance(tiles, step, 1)
        return (tiles, look(first, tiles, step + 1)), None

    never = jnp.full(2 + len(lines), steps + 1, jnp.int32)
    first = look(never, tuple(tiles), jnp.int32(0))
    (_, first), _ = lax.scan(one_step, (tuple(tiles), first), jnp.arange(steps, dtype=jnp.int32))
    # One entry a PE along each dimension, to be laid out as a field is.
    return first.reshape((1,) * len(lines) + first.shape)


def report(operation: str, first: Int[Array, "..."], names: Sequence[Any], steps: int) -> None:
    """Raises FloatingPointError that says what `first_not_finite` says on the PE where it began."""
    rows = np.asarray(first).reshape(-1, np.shape(first)[-1])
    # The earliest step of all PEs; of several in one step, any.
    step, field, *cell = rows[rows[:, 0].argmin()].tolist()
    if step > steps:
        raise FloatingPointError(
            f"{operation}: the result is not finite, but it is when each step is taken alone: "
            "programs that are compiled differently round differently, so some step overflows only "
            "just"
        )
    when = f"after step {step} of {steps}" if step else "before the first step"
    raise FloatingPointError(
        f"{operation}: field {names[field]!r} is not finite in cell {tuple(cell)} {when}; mend the "
        "operand there, or take a shorter time step: wave_limit and diffusion_limit give the "
        "longest"
    )


def _cells_of_field(
    shape: Sequence[int], lines: Lines, begins: Sequence[Int[Array, ""]]
) -> Bool[Array, "..."]:
    """Which cells of a tile are cells of the field: the last tile may not be full."""
    inside = jnp.ones(shape, bool)
    for dim, (line, begin) in enumerate(zip(lines, begins, strict=True)):
        if line.size != line.tile * line.pes:
            inside &= lax.broadcasted_iota(jnp.int32, shape, dim) + begin < line.size
    return inside
