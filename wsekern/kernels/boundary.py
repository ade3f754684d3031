"""This file is what lies beyond the ends of a field: the ghost cells, filled from those inside.

Public per-PE functions, of a tile in a padded buffer. Each dimension is filled over the whole
extent of the others, in order, as `numpy.pad` would: so a corner is the later dimension's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.lines import Line

Pairs = tuple[tuple[int, int], ...]


def fill(
    buffer: jax.Array,
    lines: Sequence[Line],
    *,
    at: Pairs,
    margins: Pairs,
    radius: Pairs,
    corners: bool = True,
) -> jax.Array:
    """`buffer` with its ghost cells filled, on the PEs at the ends of the field.

    Nothing is sent: a line that is split and periodic has none.

    Args:
      buffer: a tile between `at[dim]` cells of padding at either side.
      lines: its dimensions.
      at: low and high padding of the buffer.
      margins: how many of them are filled at each side.
      radius: how many of these follow the boundary's rule, the nearest ones; those beyond repeat
        the outermost of them. So nothing depends on how deep a halo is.
      corners: whether the other dimensions' padding is filled over too.
    """
    for dim in range(len(lines)):
        for high in (False, True):
            buffer = fill_side(
                buffer, dim, high, lines, at=at, margins=margins, radius=radius, corners=corners
            )
    return buffer


def fill_side(
    buffer: jax.Array,
    dim: int,
    high: bool,
    lines: Sequence[Line],
    *,
    at: Pairs,
    margins: Pairs,
    radius: Pairs,
    corners: bool = True,
) -> jax.Array:
    """`buffer` with the ghost cells of one side filled; see `fill`."""
    line, margin = lines[dim], margins[dim][high]
    if margin == 0 or (line.periodic and line.parts > 1):
        return buffer
    span = None if corners else tuple(pair[0] for pair in at)
    ghost = ghost_cells(buffer, dim, line, high, at[dim][0], margin, radius[dim][high])
    start = _end(line, at[dim][0]) if high else at[dim][0] - margin
    return _written(buffer, ghost, dim, line, high, start, span, lines)


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
    rule = line.high if high else line.low

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
    new: jax.Array, old: jax.Array, lines: Sequence[Line], *, at: Pairs, radius: Pairs
) -> jax.Array:
    """`new` with the `radius` cells nearest to a fixed end as they are in `old`."""
    for dim, line in enumerate(lines):
        for high, rule in enumerate((line.low, line.high)):
            width = radius[dim][high]
            if rule != "fixed" or width == 0:
                continue
            start = _end(line, at[dim][0]) - width if high else at[dim][0]
            rim = _cut(old, dim, start, width)
            new = _written(new, rim, dim, line, bool(high), start, None, lines)
    return new


def _written(buffer, slab, dim, line, high, start, span, lines):
    """`buffer` with `slab` at `start` along `dim`, on the PE at that end of the line."""
    starts = [0] * buffer.ndim
    if span is not None:
        for other in range(buffer.ndim):
            if other != dim:
                slab = lax.slice_in_dim(
                    slab, span[other], span[other] + lines[other].tile, axis=other
                )
                starts[other] = span[other]
    starts[dim] = start
    if line.parts > 1:
        here = fabric.axis_index(line.names) == (line.last if high else 0)
        slab = jnp.where(here, slab, lax.dynamic_slice(buffer, starts, slab.shape))
    return lax.dynamic_update_slice(buffer, slab, starts)


def _end(line: Line, low_padding: int) -> int:
    """Where the cell beyond the last one lies, on the PE that holds the last one."""
    return low_padding + line.rest


def _cut(buffer: jax.Array, dim: int, start: int, count: int) -> jax.Array:
    return lax.slice_in_dim(buffer, start, start + count, axis=dim)
