"""Get neighbors' cells around a tile, for all dimensions and fields at once; per PE.

They are written into the padding of a buffer that is kept, or concatenated to the tile as a new
array (`Mode`).
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.stencil import adjoint, boundary
from wsekern.kernels.stencil.buffers import Mode, Pairs, Tile, cut_line, ends, pad_tile
from wsekern.kernels.stencil.geometry import Lines


def exchange(
    buffers: Sequence[Tile],
    lines: Sequence[Lines],
    padding: Sequence[Pairs],
    *,
    mode: Mode,
    corners: bool = True,
) -> list[Tile]:
    """The buffers with their neighbors' cells in their padding; public to kernels, per PE.

    Args:
      buffers: padded tiles, each of its own dtype and shape.
      lines: the dimensions of each; along the same axes in all.
      padding: low and high padding of each.
      mode: PADDED: everything is cut from the tiles before anything is written. CARRIED for
        buffers that a loop carries on a CPU: each cut waits for the write before it, because XLA's
        CPU backend would copy the whole buffer if it did not know that a write comes after every
        cut. REVERSE as CARRIED, with the rules of `adjoint`.
      corners: whether a message holds what earlier dimensions have brought.
    """
    slabs = [
        _FieldSlabs(buffer, field, pairs, corners, mode)
        for buffer, field, pairs in zip(buffers, lines, padding, strict=True)
    ]
    for dim in range(buffers[0].ndim):
        for high in (False, True):
            # A dimension of one PE, or without halo on this side, sends nothing.
            moving = [field for field in slabs if field.moves(dim, high)]
            if not moving:
                continue

            # Defaults bind this turn's values: `write_slabs` may call the function later.
            def arriving(
                *buffers: Tile,
                moving: list[_FieldSlabs] = moving,
                dim: int = dim,
                high: bool = high,
            ) -> list[Tile]:
                sent = [f.cut(b, dim, high) for f, b in zip(moving, buffers, strict=True)]
                # One message for all fields: it wraps if any is periodic. `boundary.fill` then
                # overwrites what the others got at an open end.
                wraps = any(field.lines[dim].periodic for field in moving)
                axes = moving[0].lines[dim].axes
                return shift_together(sent, axes, -1 if high else 1, periodic=wraps)

            if mode is Mode.PADDED:
                arrived = arriving(*(field.buffer for field in moving))
                for field, slab in zip(moving, arrived, strict=True):
                    field.received[dim, high] = slab
                continue
            written = adjoint.write_slabs(
                [field.buffer for field in moving],
                arriving,
                [field.starts(dim, high) for field in moving],
                mode=mode,
            )
            for field, buffer in zip(moving, written, strict=True):
                field.buffer = buffer
    return [field.write() for field in slabs]


def concatenate_halo(
    tiles: Sequence[Tile],
    lines: Sequence[Lines],
    widths: Pairs,
    *,
    corners: bool = True,
) -> list[Tile]:
    """The tiles with their halos, concatenated to new arrays; public to kernels, per PE.

    Where a tile is hardly wider than its halo, as on a virtual wafer, a padded buffer is many times
    the tile. Of an array that is concatenated here, XLA holds only what the update cuts from it.
    """
    # With corners a block has grown along earlier dimensions when the next one is sent.
    blocks = list(tiles)
    for dim, (low, high) in enumerate(widths):
        sides = [
            _beyond_side(blocks if corners else tiles, lines, dim, bool(side), width)
            for side, width in enumerate((low, high))
        ]
        for i, field in enumerate(lines):
            parts = [blocks[i]]
            for side, slabs in enumerate(sides):
                if slabs is not None:
                    slab = _widen(slabs[i], blocks[i], dim, widths)
                    parts.insert(len(parts) * side, slab)  # before the tile, or after it
            blocks[i] = jnp.concatenate(parts, dim) if len(parts) > 1 else blocks[i]
            if high and field[dim].size != field[dim].tile * field[dim].pes:
                # The last tile is not full: its ghost cells lie inside the block, after its cells.
                padding = tuple(pair if d <= dim else (0, 0) for d, pair in enumerate(widths))
                [blocks[i]] = boundary.fill_side(
                    [blocks[i]], dim, True, [field], padding=padding, margins=widths,
                    radius=widths, mode=Mode.JOINED,
                )  # fmt: skip
    return blocks


def _beyond_side(
    blocks: Sequence[Tile], lines: Sequence[Lines], dim: int, high: bool, width: int
) -> list[Tile] | None:
    """What lies beyond one side of each block: the neighbor's cells, or at an end ghost cells."""
    if width == 0:
        return None
    # Made on every PE, and chosen at the ends only.
    ghosts = [
        None
        if field[dim].periodic and field[dim].split
        else boundary.ghost_cells(block, dim, field[dim], high, 0, width, width)
        for block, field in zip(blocks, lines, strict=True)
    ]
    line = lines[0][dim]
    if not line.split:
        return [ghost for ghost in ghosts if ghost is not None]
    # What lies beyond the high side is the low end of the next PE's tile.
    begin = 0 if high else line.tile - width
    sent = [cut_line(block, dim, begin, width) for block in blocks]
    wraps = any(field[dim].periodic for field in lines)
    arrived = shift_together(sent, line.axes, -1 if high else 1, periodic=wraps)
    at_end = fabric.axis_index(line.axes) == (line.last_pe if high else 0)
    return [
        slab if ghost is None else jnp.where(at_end, ghost, slab)
        for slab, ghost in zip(arrived, ghosts, strict=True)
    ]


def _widen(slab: Tile, block: Tile, dim: int, widths: Pairs) -> Tile:
    """`slab` with zeros for the corners that it lacks, to be concatenated to `block`."""
    missing = [
        pair if d < dim and slab.shape[d] != block.shape[d] else (0, 0)
        for d, pair in enumerate(widths)
    ]
    return pad_tile(slab, tuple(missing)) if any(map(any, missing)) else slab


class _FieldSlabs:
    """What one field sends and receives in an exchange."""

    def __init__(
        self, buffer: Tile, lines: Lines, padding: Pairs, corners: bool, mode: Mode
    ) -> None:
        self.buffer = buffer
        self.lines = lines
        self.padding = padding
        self.corners = corners
        self.mode = mode
        self.received: dict[tuple[int, bool], Tile] = {}  # by dimension and side; PADDED only

    def moves(self, dim: int, high: bool) -> bool:
        return self.lines[dim].split and self.padding[dim][high] > 0

    def cut(self, buffer: Tile, dim: int, high: bool) -> Tile:
        """The cells that lie beyond a side of the neighbor's tile."""
        width = self.padding[dim][high]
        begin = 0 if high else self.lines[dim].tile - width  # counted in the tile
        starts, shape = self._span(dim)
        starts[dim], shape[dim] = self.padding[dim][0] + begin, width
        if self.mode is not Mode.PADDED or not self.corners:
            return lax.slice(buffer, starts, ends(starts, shape))
        # Nothing is written yet. So what earlier dimensions brought is concatenated to the slab.
        low = [pair[0] for pair in self.padding]
        end = ends(low, [line.tile for line in self.lines])
        low[dim], end[dim] = starts[dim], starts[dim] + width
        slab = lax.slice(buffer, low, end)
        for earlier in range(dim):
            before, after = (
                [] if side is None else [cut_line(side, dim, begin, width)]
                for side in (self.received.get((earlier, high)) for high in (False, True))
            )
            slab = jnp.concatenate([*before, slab, *after], earlier) if before or after else slab
        return slab

    def write(self) -> Tile:
        """Writes all that was received into the buffer, and returns it."""
        # The last to arrive is written first: what it waited for has been cut by then.
        for (dim, high), slab in reversed(self.received.items()):
            self.buffer = lax.dynamic_update_slice(self.buffer, slab, self.starts(dim, high))
        return self.buffer

    def starts(self, dim: int, high: bool) -> list[int]:
        """Where the cells from beyond a side are written."""
        starts, _ = self._span(dim)
        starts[dim] = self.padding[dim][0] + self.lines[dim].tile if high else 0
        return starts

    def _span(self, dim: int) -> tuple[list[int], list[int]]:
        """Where a slab begins and how far it reaches in the dimensions other than `dim`.

        With corners it includes the halo that earlier dimensions have brought. So corners arrive in
        two phases, for two dimensions, and no PE sends to one diagonally across.
        """
        starts, shape = [], []
        for other, (line, (low, high)) in enumerate(zip(self.lines, self.padding, strict=True)):
            brought = self.corners and other < dim and line.split
            starts.append(0 if brought else low)
            shape.append(low + line.tile + high if brought else line.tile)
        return starts, shape


def shift_together(
    tiles: Sequence[Tile], along: tuple[str, ...], by: int, *, periodic: bool
) -> list[Tile]:
    """The tiles of the PE `by` (1 or -1) places before, in one message; a per-PE function.

    Floating dtypes travel as the widest of them, which holds the others' values exactly, so that
    gradients pass. Integers travel as bits of that dtype.

    Args:
      tiles: what this PE sends.
      along: the axes along which the PEs stand in line, outermost first.
      by: 1 toward higher places, -1 toward lower ones.
      periodic: whether the ends of the line meet; else what a PE at an open end gets is undefined.
    """
    if len(tiles) == 1:
        return [_shift(tiles[0], along, by, periodic)]
    carrier = _message_dtype(tiles)
    packed = jnp.concatenate([_to_message(t, carrier).ravel() for t in tiles])
    message = _shift(packed, along, by, periodic)
    begin, arrived = 0, []
    for tile in tiles:
        size = math.prod(tile.shape)
        part = cut_line(message, 0, begin, size).reshape(tile.shape)
        arrived.append(_from_message(part, tile.dtype))
        begin += size
    return arrived


def _shift(tile: Tile, along: tuple[str, ...], by: int, periodic: bool) -> Tile:
    *outer, inner = along
    if not outer:
        return fabric.shift(tile, inner, by, periodic=periodic)
    # The innermost axis wraps, and what wrapped moves one place further along the others. On a
    # line of 2 x 3 PEs, numbered 0 to 5, a shift by 1 takes the tile of PE 2 to PE 0, then to 3.
    moved = fabric.shift(tile, inner, by)
    further = _shift(moved, tuple(outer), by, periodic)
    entered = fabric.axis_index(inner) == (0 if by > 0 else fabric.axis_size(inner) - 1)
    return jnp.where(entered, further, moved)


def _message_dtype(tiles: Sequence[Tile]) -> jnp.dtype:
    # Integers travel as bits, so a carrier has at least their size. Where floating dtypes differ it
    # is float32 or float64, which hold bfloat16 and float16 exactly.
    widest = max(tile.dtype.itemsize for tile in tiles)
    floats = [tile.dtype for tile in tiles if jnp.issubdtype(tile.dtype, jnp.floating)]
    if len(set(floats)) == 1 and floats[0].itemsize == widest:
        return floats[0]
    return jnp.dtype(jnp.float64 if widest > 4 else jnp.float32)


def _to_message(tile: Tile, carrier: jnp.dtype) -> Tile:
    if jnp.issubdtype(tile.dtype, jnp.floating):
        return tile.astype(carrier)
    # Masks and narrow integers are widened first: a bitcast keeps the size.
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[carrier.itemsize]
    return lax.bitcast_convert_type(tile.astype(word), carrier)


def _from_message(part: Tile, dtype: jnp.dtype) -> Tile:
    if jnp.issubdtype(dtype, jnp.floating):
        return part.astype(dtype)
    word = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[part.dtype.itemsize]
    return lax.bitcast_convert_type(part, word).astype(dtype)
