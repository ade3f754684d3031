"""This file is where a field ceased to be finite: the field, the step and the cell.

Steps are not watched while they are taken, for that would cost each of them a look at every cell.
Where the result is not finite, they are taken once more, one at a time, by a program that looks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil.geometry import Line
from wsekern.kernels.stencil.steps import Run


def is_finite(arrays: Any) -> bool:
    """Whether all cells of all arrays are; waits for them."""
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(arrays))


def began(run: Run, tiles: Sequence[jax.Array], steps: int) -> jax.Array:
    """`[1, ..., 2 + dimensions]`: this PE's first step, field and cell that is not finite; per PE.

    Steps count from 1, for 0 is what was given; `steps + 1` says that all are finite.
    """
    lines = run.plan.lines[0]
    begins = [
        fabric.axis_index(line.names) * line.tile if line.parts > 1 else jnp.int32(0)
        for line in lines
    ]

    def look(found, tiles, step):
        for i, tile in enumerate(tiles):
            bad = ~jnp.isfinite(tile) & _inside(tile.shape, lines, begins)
            cell = jnp.unravel_index(jnp.argmax(bad), tile.shape)
            place = [b + c for b, c in zip(begins, cell, strict=True)]
            new = jnp.stack([step, jnp.int32(i), *place]).astype(jnp.int32)
            found = jnp.where(jnp.any(bad) & (found[0] > steps), new, found)
        return found

    def one(carry, step):
        tiles, found = carry
        tiles, _ = run.advance(tiles, step, 1)
        return (tiles, look(found, tiles, step + 1)), None

    never = jnp.full(2 + len(lines), steps + 1, jnp.int32)
    found = look(never, tiles, jnp.int32(0))
    (_, found), _ = lax.scan(one, (tuple(tiles), found), jnp.arange(steps, dtype=jnp.int32))
    return found.reshape((1,) * len(lines) + found.shape)


def report(what: str, found: Any, names: Sequence[Any], steps: int) -> None:
    """Raises FloatingPointError that says what `began` found on the PE where it began."""
    rows = np.asarray(found).reshape(-1, np.shape(found)[-1])
    step, field, *cell = rows[rows[:, 0].argmin()].tolist()
    if step > steps:
        raise FloatingPointError(
            f"{what}: the result is not finite, though each step taken alone is: what was compiled "
            "otherwise rounds otherwise, so some step overflows only just"
        )
    when = f"after step {step} of {steps}" if step else "before the first step"
    raise FloatingPointError(
        f"{what}: field {names[field]!r} is not finite in cell {tuple(cell)} {when}; mend what is "
        "given there, or take a shorter time step: wave_limit and diffusion_limit say how long it "
        "may be"
    )


def _inside(shape: Sequence[int], lines: Sequence[Line], begins: Sequence[jax.Array]) -> jax.Array:
    """Which cells of a tile are cells of the field, where its last tile is not full."""
    inside = jnp.ones(shape, bool)
    for dim, (line, begin) in enumerate(zip(lines, begins, strict=True)):
        if line.size != line.tile * line.parts:
            inside &= lax.broadcasted_iota(jnp.int32, shape, dim) + begin < line.size
    return inside
