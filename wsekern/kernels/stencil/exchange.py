"""This file is how neighbors' cells get around a tile, all dimensions and fields of it; per PE.

Written into the padding of a buffer that is kept, or joined to the tile as a new array.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, boundary
from wsekern.kernels.stencil.boundary import Pairs
from wsekern.kernels.stencil.geometry import Line


def padded(tile: jax.Array, at: Pairs) -> jax.Array:
    """`tile` in a buffer with `at` cells of padding around it."""
    return lax.pad(tile, jnp.zeros((), tile.dtype), [(low, high, 0) for low, high in at])


def exchange(
    buffers: Sequence[jax.Array],
    lines: Sequence[Sequence[Line]],
    at: Sequence[Pairs],
    *,
    corners: bool = True,
    fresh: bool = False,
    backward: bool = False,
) -> list[jax.Array]:
    """The buffers with their neighbors' cells in their padding; public to kernels, per PE.

    Args:
      buffers: tiles between padding, each of its own dtype and shape.
      lines: the dimensions of each; along the same axes in all.
      at: low and high padding of each.
      corners: whether what earlier dimensions have brought is part of what is sent.
      fresh: whether the tiles have just been padded. Then all is cut from them before anything is
        written. Else each cut waits for the write before it: of a buffer that a loop carries, XLA
        would copy the whole, not knowing that a write comes after every cut.
      backward: whether this is only differentiated in reverse, and then shall be fast.
    """
    slabs = [
        _Slabs(b, own, a, corners, fresh) for b, own, a in zip(buffers, lines, at, strict=True)
    ]
    for dim in range(buffers[0].ndim):
        for high in (False, True):
            moving = [field for field in slabs if field.moves(dim, high)]
            if not moving:
                continue
            wraps = any(field.lines[dim].periodic for field in moving)
            along = moving[0].lines[dim].names

            def arriving(*buffers, moving=moving, dim=dim, high=high, along=along, wraps=wraps):
                sent = [f.cut(b, dim, high) for f, b in zip(moving, buffers, strict=True)]
                return shift_together(sent, along, -1 if high else 1, periodic=wraps)

            if fresh:
                got = arriving(*(field.buffer for field in moving))
                for field, slab in zip(moving, got, strict=True):
                    field.received[dim, high] = slab
                continue
            new = adjoint.writing(
                [field.buffer for field in moving],
                arriving,
                [field.starts(dim, high) for field in moving],
                backward=backward,
            )
            for field, buffer in zip(moving, new, strict=True):
                field.buffer = buffer
    return [field.written() for field in slabs]


def joined(
    tiles: Sequence[jax.Array],
    lines: Sequence[Sequence[Line]],
    widths: Pairs,
    *,
    corners: bool = True,
) -> list[jax.Array]:
    """The tiles with their halos, put together as new arrays; public to kernels, per PE.

    Where a tile is hardly wider than its halo, as on a virtual wafer, a padded buffer is many times
    the tile; of what is joined here, XLA holds no more than the update cuts from it.
    """
    blocks = list(tiles)
    for dim, (low, high) in enumerate(widths):
        sides = [
            _arrivals(blocks if corners else tiles, lines, dim, bool(side), width)
            for side, width in enumerate((low, high))
        ]
        for i, own in enumerate(lines):
            around = [blocks[i]]
            for side, slabs in enumerate(sides):
                if slabs is not None:
                    slab = _widened(slabs[i], blocks[i], dim, widths)
                    around.insert(len(around) * side, slab)
            blocks[i] = jnp.concatenate(around, dim) if around[1:] else blocks[i]
            if high and own[dim].size != own[dim].tile * own[dim].parts:
                at = tuple(pair if d <= dim else (0, 0) for d, pair in enumerate(widths))
                [blocks[i]] = boundary.fill_side(
                    [blocks[i]], dim, True, [own], at=at, margins=widths, radius=widths
                )
    return blocks


def _arrivals(blocks, lines, dim, high, width):
    """What lies beyond one side of each block: the neighbor's cells, or at an end ghost cells."""
    if width == 0:
        return None
    ghosts = [
        None if own[dim].periodic and own[dim].parts > 1
        else boundary.ghost_cells(b, dim, own[dim], high, 0, width, width)
        for b, own in zip(blocks, lines, strict=True)
    ]  # fmt: skip
    line = lines[0][dim]
    if line.parts == 1:
        return ghosts
    begin = 0 if high else line.tile - width
    sent = [lax.slice_in_dim(b, begin, begin + width, axis=dim) for b in blocks]
    wraps = any(own[dim].periodic for own in lines)
    got = shift_together(sent, line.names, -1 if high else 1, periodic=wraps)
    ends_here = fabric.axis_index(line.names) == (line.last if high else 0)
    return [
        g if ghost is None else jnp.where(ends_here, ghost, g)
        for g, ghost in zip(got, ghosts, strict=True)
    ]


def _widened(slab, block, dim, widths):
    """`slab` with zeros for the corners that it lacks, to be joined to `block`."""
    missing = [
        pair if d < dim and slab.shape[d] != block.shape[d] else (0, 0)
        for d, pair in enumerate(widths)
    ]
    return padded(slab, tuple(missing)) if any(map(any, missing)) else slab


class _Slabs:
    """What one field sends and receives."""

    def __init__(self, buffer, lines, at, corners, fresh):
        self.buffer, self.lines, self.at = buffer, lines, at
        self.corners, self.fresh = corners, fresh
        self.received: dict[tuple[int, bool], jax.Array] = {}

    def moves(self, dim: int, high: bool) -> bool:
        return self.lines[dim].parts > 1 and self.at[dim][high] > 0

    def cut(self, buffer: jax.Array, dim: int, high: bool) -> jax.Array:
        """The cells that lie beyond a side of the neighbor's tile."""
        width = self.at[dim][high]
        begin = 0 if high else self.lines[dim].tile - width  # in the tile
        starts, shape = self._span(dim)
        starts[dim], shape[dim] = self.at[dim][0] + begin, width
        if not (self.fresh and self.corners):
            return lax.slice(buffer, starts, _sum(starts, shape))
        low = [pair[0] for pair in self.at]
        end = _sum(low, [line.tile for line in self.lines])
        low[dim], end[dim] = starts[dim], starts[dim] + width
        slab = lax.slice(buffer, low, end)
        for earlier in range(dim):
            around = [self.received.get((earlier, side)) for side in (False, True)]
            before, after = (
                [] if s is None else [lax.slice_in_dim(s, begin, begin + width, axis=dim)]
                for s in around
            )
            slab = jnp.concatenate([*before, slab, *after], earlier) if before or after else slab
        return slab

    def written(self) -> jax.Array:
        # The last to arrive is written first: what it waited for has been cut by then.
        for (dim, high), slab in reversed(self.received.items()):
            self.buffer = lax.dynamic_update_slice(self.buffer, slab, self.starts(dim, high))
        return self.buffer

    def starts(self, dim: int, high: bool) -> list[int]:
        """Where what comes from beyond a side is written."""
        starts, _ = self._span(dim)
        starts[dim] = self.at[dim][0] + self.lines[dim].tile if high else 0
        return starts

    def _span(self, dim: int) -> tuple[list[int], list[int]]:
        """Where a slab begins and how far it reaches in the dimensions other than `dim`."""
        starts, shape = [], []
        for other, (line, (low, high)) in enumerate(zip(self.lines, self.at, strict=True)):
            brought = self.corners and other < dim and line.parts > 1
            starts.append(0 if brought else low)
            shape.append(low + line.tile + high if brought else line.tile)
        return starts, shape


def _sum(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(a, b, strict=True)]


def shift_together(
    tiles: Sequence[jax.Array], along: tuple[str, ...], by: int, *, periodic: bool
) -> list[jax.Array]:
    """The tiles of the PE `by` (1 or -1) places before, in one message; a per-PE function.

    Floating dtypes travel as the widest of them, in which the others have their values exactly, so
    that gradients pass; whole numbers travel as its bits.

    Args:
      tiles: to be sent.
      along: the axes along which the PEs stand in line, outermost first.
      by: 1 toward higher places, -1 toward lower ones.
      periodic: whether the ends of the line meet; else what a PE at an open end gets is undefined.
    """
    if len(tiles) == 1:
        return [_shift(tiles[0], along, by, periodic)]
    carrier = _carrier(tiles)
    packed = jnp.concatenate([_packed(t, carrier).ravel() for t in tiles])
    moved = _shift(packed, along, by, periodic)
    begins, got = 0, []
    for tile in tiles:
        part = lax.slice_in_dim(moved, begins, begins + math.prod(tile.shape))
        begins += math.prod(tile.shape)
        got.append(_unpacked(part.reshape(tile.shape), tile.dtype))
    return got


def _shift(tile: jax.Array, along: tuple[str, ...], by: int, periodic: bool) -> jax.Array:
    *outer, inner = along
    if not outer:
        return fabric.shift(tile, inner, by, periodic=periodic)
    # The innermost axis wraps, and what wrapped goes one place further along the others.
    moved = fabric.shift(tile, inner, by)
    further = _shift(moved, tuple(outer), by, periodic)
    entered = fabric.axis_index(inner) == (0 if by > 0 else fabric.axis_size(inner) - 1)
    return jnp.where(entered, further, moved)


def _carrier(tiles: Sequence[jax.Array]) -> jnp.dtype:
    widest = max(tile.dtype.itemsize for tile in tiles)
    floats = [tile.dtype for tile in tiles if jnp.issubdtype(tile.dtype, jnp.floating)]
    if len(set(floats)) == 1 and floats[0].itemsize == widest:
        return floats[0]
    return jnp.dtype(jnp.float64 if widest > 4 else jnp.float32)


def _packed(tile: jax.Array, carrier: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(tile.dtype, jnp.floating):
        return tile.astype(carrier)
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[carrier.itemsize]
    return lax.bitcast_convert_type(tile.astype(word), carrier)


def _unpacked(part: jax.Array, dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.floating):
        return part.astype(dtype)
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[part.dtype.itemsize]
    return lax.bitcast_convert_type(part, word).astype(dtype)
