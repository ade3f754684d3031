"""Ghost cells: what lies beyond the ends of a field, filled from the cells inside; per PE.

Each dimension is filled over the whole extent of the others, in order, as `numpy.pad` does it: a
corner gets the later dimension's rule.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, cpu_fusion
from wsekern.kernels.stencil.buffers import Mode, Pairs, Step, Tile, cut_line, ends
from wsekern.kernels.stencil.geometry import Line, Lines


def fill(
    buffers: Sequence[Tile],
    lines: Sequence[Lines],
    *,
    padding: Pairs,
    margins: Pairs,
    radius: Pairs,
    mode: Mode,
    corners: bool = True,
    cpu_counter: Step | None = None,
) -> list[Tile]:
    """`buffers` with their ghost cells filled, on the PEs at the ends of the field.

    Nothing is sent. A dimension that is split and periodic has no ghost cells.

    Args:
      buffers: tiles with `padding` around them.
      lines: the dimensions of each.
      padding: low and high padding of the buffers, in cells.
      margins: how much of the padding is filled at each side.
      radius: how many cells of the margin follow the boundary's rule, the nearest ones. Those
        farther out repeat the outermost of them, so no result depends on how deep a halo is.
      mode: REVERSE uses rules that are faster, and differentiable in reverse mode only.
      corners: whether the other dimensions' padding is filled too.
      cpu_counter: as in `cpu_fusion.compute_once`. It keeps XLA's CPU backend from copying a whole
        buffer because the buffer is cut and written in one fusion.
    """
    # In order: a later dimension's ghost cells are made from those of earlier dimensions too.
    for dim in range(len(padding)):
        for high in (False, True):
            buffers = fill_side(
                buffers, dim, high, lines, padding=padding, margins=margins, radius=radius,
                mode=mode, corners=corners, cpu_counter=cpu_counter,
            )  # fmt: skip
    return list(buffers)


def fill_side(
    buffers: Sequence[Tile],
    dim: int,
    high: bool,
    lines: Sequence[Lines],
    *,
    padding: Pairs,
    margins: Pairs,
    radius: Pairs,
    mode: Mode,
    corners: bool = True,
    cpu_counter: Step | None = None,
) -> list[Tile]:
    """`buffers` with the ghost cells of one side of one dimension filled; see `fill`."""
    margin, filled = margins[dim][high], list(buffers)
    # Where a dimension is split and periodic, neighbors' cells lie there, brought by `exchange`.
    ending = [
        i
        for i, field in enumerate(lines)
        if margin and not (field[dim].periodic and field[dim].split)
    ]
    starts = [[0 if corners else low for low, _ in padding] for _ in ending]
    for start, i in zip(starts, ending, strict=True):
        low = padding[dim][0]
        start[dim] = _end_of_last_tile(lines[i][dim], low) if high else low - margin

    def ghost_slabs(*buffers: Tile) -> list[Tile]:
        return [
            ghost_slab(buffer, lines[i], start)
            for buffer, i, start in zip(buffers, ending, starts, strict=True)
        ]

    def ghost_slab(buffer: Tile, field: Lines, start: list[int]) -> Tile:
        slab = ghost_cells(
            buffer, dim, field[dim], high, padding[dim][0], margin, radius[dim][high]
        )
        # The padding of other dimensions holds nothing then, so no ghost cell is made from it.
        if not corners:
            for other, line in enumerate(field):
                if other != dim:
                    slab = cut_line(slab, other, start[other], line.tile)
        return _where_field_ends(slab, buffer, start, field[dim], high)

    if ending:
        # A constant rule reads no cell, so there is no cut that XLA could fuse with the write.
        reads = any(not isinstance(lines[i][dim].ends()[high], float) for i in ending)
        make = ghost_slabs
        if cpu_counter is not None and reads:
            once = functools.partial(cpu_fusion.compute_once, ghost_slabs, cpu_counter)
            make = functools.partial(once, results_too=True)
        written = adjoint.write_slabs([buffers[i] for i in ending], make, starts, mode=mode)
        for i, buffer in zip(ending, written, strict=True):
            filled[i] = buffer
    return filled


def ghost_cells(
    buffer: Tile,
    dim: int,
    line: Line,
    high: bool,
    low_padding: int,
    margin: int,
    width: int,
) -> Tile:
    """The ghost cells of one side, in the order of the buffer.

    Args:
      buffer: a tile with padding.
      dim: the dimension.
      line: that dimension.
      high: which end.
      low_padding: cells of padding before the tile.
      margin: how many ghost cells are made.
      width: how many of them follow the rule; the others repeat the outermost of these.

    Raises:
      ValueError: a boundary that is a function changes shape or dtype.
    """
    rule = line.ends()[high]

    def nearest(skip: int, count: int) -> Tile:
        if high:
            return cut_line(buffer, dim, _end_of_last_tile(line, low_padding) - skip - count, count)
        return cut_line(buffer, dim, low_padding + skip, count)

    shape = (*buffer.shape[:dim], margin, *buffer.shape[dim + 1 :])
    if isinstance(rule, float):
        # Like a part of the buffer, to vary over the same axes.
        return jnp.full_like(cut_line(buffer, dim, 0, 1), rule, shape=shape)
    if rule in ("edge", "fixed"):
        return jnp.broadcast_to(nearest(0, 1), shape)
    if rule == "periodic":  # on one PE: the cells of the other end
        start = low_padding if high else low_padding + line.size - margin
        return cut_line(buffer, dim, start, margin)
    if callable(rule):
        near = nearest(0, width)
        ghost = rule(near)
        if ghost.shape != near.shape or ghost.dtype != near.dtype:
            raise ValueError(
                f"boundary: the function for dimension {dim} makes {ghost.dtype} {ghost.shape} of "
                f"{near.dtype} {near.shape}; it must keep shape and dtype"
            )
    elif rule in ("reflect", "symmetric"):
        # "reflect" skips the last cell, which lies on the mirror; "symmetric" repeats it.
        ghost = jnp.flip(nearest(int(rule == "reflect"), width), dim)
    else:
        raise NotImplementedError(f"boundary {rule!r} is in geometry.RULES and is not filled here")
    if margin == width:
        return ghost
    # A deep halo, for later steps: only the cells near the end follow the rule in each of them.
    outermost = cut_line(ghost, dim, width - 1 if high else 0, 1)
    far = jnp.broadcast_to(outermost, (*shape[:dim], margin - width, *shape[dim + 1 :]))
    return jnp.concatenate([ghost, far] if high else [far, ghost], dim)


def hold_rim(
    new: Tile, old: Tile, lines: Lines, *, padding: Pairs, radius: Pairs, mode: Mode
) -> Tile:
    """`new` with the `radius` cells nearest to each "fixed" end as they are in `old`."""
    for dim, line in enumerate(lines):
        for high, rule in enumerate(line.ends()):
            # Over the whole extent of the other dimensions: their padding is refilled anyway.
            width = radius[dim][high]
            if rule != "fixed" or width == 0:
                continue
            low = padding[dim][0]
            starts = [0] * new.ndim
            starts[dim] = _end_of_last_tile(line, low) - width if high else low

            # Defaults bind this turn's values: `write_slabs` may call the function later.
            def rim(
                new: Tile,
                old: Tile,
                dim: int = dim,
                width: int = width,
                starts: list[int] = starts,
                line: Line = line,
                high: bool = bool(high),
            ) -> list[Tile]:
                kept = cut_line(old, dim, starts[dim], width)
                return [_where_field_ends(kept, new, starts, line, high)]

            new, _ = adjoint.write_slabs([new, old], rim, [starts, None], mode=mode)
    return new


def _where_field_ends(
    slab: Tile, buffer: Tile, starts: Sequence[int], line: Line, high: bool
) -> Tile:
    """`slab` on the PEs at that end of the field, elsewhere what `buffer` holds there."""
    if not line.split:
        return slab
    # A select, not a branch: under `vmap` every PE computes both in any case.
    at_end = fabric.axis_index(line.axes) == (line.last_pe if high else 0)
    return jnp.where(at_end, slab, lax.slice(buffer, starts, ends(starts, slab.shape)))


def _end_of_last_tile(line: Line, low_padding: int) -> int:
    """Where the first cell beyond the field lies, on the PE that holds the last cell."""
    return low_padding + line.last_cells
