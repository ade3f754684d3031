"""This file is what lies beyond the ends of a field: the ghost cells, filled from those inside.

Public per-PE functions, of a tile in a padded buffer. Each dimension is filled over the whole
extent of the others, in order, as `numpy.pad` would: so a corner is the later dimension's.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, cpu_fusion
from wsekern.kernels.stencil.geometry import Boundary, Line

Pairs = tuple[tuple[int, int], ...]


def fill(
    buffers: Sequence[jax.Array],
    lines: Sequence[Sequence[Line]],
    *,
    at: Pairs,
    margins: Pairs,
    radius: Pairs,
    corners: bool = True,
    step: Any = None,
    backward: bool = False,
) -> list[jax.Array]:
    """`buffers` with their ghost cells filled, on the PEs at the ends of the field.

    Nothing is sent: a line that is split and periodic has none.

    Args:
      buffers: tiles between `at[dim]` cells of padding at either side.
      lines: the dimensions of each.
      at: low and high padding of the buffers.
      margins: how many of them are filled at each side.
      radius: how many of these follow the boundary's rule, the nearest ones; those beyond repeat
        the outermost of them. So nothing depends on how deep a halo is.
      corners: whether the other dimensions' padding is filled over too.
      step: of a loop that carries the buffers on CPUs, where else XLA would copy them.
      backward: whether this is only differentiated in reverse, and then shall be fast.
    """
    for dim in range(len(at)):
        for high in (False, True):
            buffers = fill_side(
                buffers, dim, high, lines, at=at, margins=margins, radius=radius, corners=corners,
                step=step, backward=backward,
            )  # fmt: skip
    return list(buffers)


def fill_side(
    buffers: Sequence[jax.Array],
    dim: int,
    high: bool,
    lines: Sequence[Sequence[Line]],
    *,
    at: Pairs,
    margins: Pairs,
    radius: Pairs,
    corners: bool = True,
    step: Any = None,
    backward: bool = False,
) -> list[jax.Array]:
    """`buffers` with the ghost cells of one side filled; see `fill`."""
    margin, filled = margins[dim][high], list(buffers)
    own = [i for i, l in enumerate(lines) if margin and not (l[dim].periodic and l[dim].parts > 1)]
    starts = [[0 if corners else pair[0] for pair in at] for _ in own]
    for start, i in zip(starts, own, strict=True):
        start[dim] = _end(lines[i][dim], at[dim][0]) if high else at[dim][0] - margin

    def ghosts(*buffers):
        return [ghost(b, lines[i], start) for b, i, start in zip(buffers, own, starts, strict=True)]

    def ghost(buffer, lines, start):
        slab = ghost_cells(buffer, dim, lines[dim], high, at[dim][0], margin, radius[dim][high])
        if not corners:
            for other, line in enumerate(lines):
                if other != dim:
                    slab = _cut(slab, other, start[other], line.tile)
        return _at_end(slab, buffer, start, lines[dim], high)

    if own:
        reads = step is not None and any(
            not isinstance(_rule(lines[i][dim], high), float) for i in own
        )
        make = functools.partial(cpu_fusion.apart, ghosts, step) if reads else ghosts
        new = adjoint.writing([buffers[i] for i in own], make, starts, backward=backward)
        for i, buffer in zip(own, new, strict=True):
            filled[i] = buffer
    return filled


def ghost_cells(
    buffer: jax.Array,
    dim: int,
    line: Line,
    high: bool,
    low_padding: int,
    margin: int,
    width: int,
) -> jax.Array:
    """The ghost cells of one side, in the order of the buffer, as wide as `margin`."""
    rule = _rule(line, high)

    def inward(skip: int, count: int) -> jax.Array:
        if high:
            return _cut(buffer, dim, _end(line, low_padding) - skip - count, count)
        return _cut(buffer, dim, low_padding + skip, count)

    shape = (*buffer.shape[:dim], margin, *buffer.shape[dim + 1 :])
    if isinstance(rule, float):
        return jnp.full_like(_cut(buffer, dim, 0, 1), rule, shape=shape)
    if rule in ("edge", "fixed"):
        return jnp.broadcast_to(inward(0, 1), shape)
    if rule == "periodic":
        start = low_padding if high else low_padding + line.size - margin
        return _cut(buffer, dim, start, margin)
    if callable(rule):
        near = inward(0, width)
        ghost = rule(near)
        if ghost.shape != near.shape or ghost.dtype != near.dtype:
            raise ValueError(
                f"boundary: the function for dimension {dim} makes {ghost.dtype} {ghost.shape} of "
                f"{near.dtype} {near.shape}; it must keep shape and dtype"
            )
    else:
        ghost = jnp.flip(inward(rule == "reflect", width), dim)
    if margin == width:
        return ghost
    outermost = lax.slice_in_dim(ghost, *((width - 1, width) if high else (0, 1)), axis=dim)
    far = jnp.broadcast_to(outermost, (*shape[:dim], margin - width, *shape[dim + 1 :]))
    return jnp.concatenate([ghost, far] if high else [far, ghost], dim)


def hold_rim(
    new: jax.Array,
    old: jax.Array,
    lines: Sequence[Line],
    *,
    at: Pairs,
    radius: Pairs,
    backward: bool = False,
) -> jax.Array:
    """`new` with the `radius` cells nearest to a fixed end as they are in `old`."""
    for dim, line in enumerate(lines):
        for high, rule in enumerate((line.low, line.high)):
            width = radius[dim][high]
            if rule != "fixed" or width == 0:
                continue
            starts = [0] * new.ndim
            starts[dim] = _end(line, at[dim][0]) - width if high else at[dim][0]

            def rim(new, old, dim=dim, width=width, starts=starts, line=line, high=high):
                return [_at_end(_cut(old, dim, starts[dim], width), new, starts, line, high)]

            new, _ = adjoint.writing([new, old], rim, [starts, None], backward=backward)
    return new


def _rule(line: Line, high: bool) -> Boundary:
    return line.high if high else line.low


def _at_end(slab, buffer, starts, line, high):
    """`slab` on the PE at that end of the line, elsewhere what `buffer` holds there."""
    if line.parts == 1:
        return slab
    here = fabric.axis_index(line.names) == (line.last if high else 0)
    end = [a + b for a, b in zip(starts, slab.shape, strict=True)]
    return jnp.where(here, slab, lax.slice(buffer, starts, end))


def _end(line: Line, low_padding: int) -> int:
    """Where the cell beyond the last one lies, on the PE that holds the last one."""
    return low_padding + line.rest


def _cut(buffer: jax.Array, dim: int, start: int, count: int) -> jax.Array:
    return lax.slice_in_dim(buffer, start, start + count, axis=dim)
