"""This file is halo exchange: each tile with the nearest cells of its neighbors around it.

Corners go in two phases, as in D. Kjolstad and M. Snir, "Ghost Cell Pattern", 2010: a dimension's
message holds what the dimensions before it have brought, so that no PE writes to one diagonally
across. All fields go in one message to each neighbor. What comes is written into padding.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from wsekern import fabric, layout
from wsekern.kernels import boundary as ends
from wsekern.kernels import lines as geometry
from wsekern.kernels import message
from wsekern.kernels.boundary import Pairs
from wsekern.kernels.lines import Boundary, Line, Width
from wsekern.kernels.local import program_of
from wsekern.wafer import Wafer

Along = Sequence[None | str | tuple[str, ...]]


def halo_exchange(
    u: Any,
    width: Width | Sequence[Width],
    *,
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    corners: bool = True,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Any:
    """The tiles of `u`, each with its halo, side by side as one array.

    A dimension of `N` cells over `p` PEs becomes one of `p * (N/p + low + high)`; `crop` is the
    inverse. A PE sends, to each neighbor along a dimension, one message of that many cells in
    depth, in two steps a dimension.

    Args:
      u: a field, or a pytree of fields of one shape; of any floating or integer dtypes.
      width: cells of the halo: one number for every dimension that is split, or a number or a pair
        (low, high) for each dimension.
      boundary: what lies beyond the field, for all sides, or for each dimension, or for each
        dimension (low, high): "periodic", "zero", a number, "edge" (the last cell again),
        "reflect" (about the last cell), "symmetric" (about its outer face), "fixed" (as "edge";
        `stencil` holds the rim still) or a function of the cells nearest to that side, as many as
        the halo is wide, in order, that gives the ghost cells. For a pytree also a dict of these
        by the name of a field.
      corners: whether diagonal neighbors' cells come too; without, all messages go in one step, and
        corners hold nothing of use.
      spec: over which axes the dimensions lie. By default as `u` is laid out, else the first
        dimension along y and over the wafers, and the second along x.
      wafer: where to run; by default the current wafer, or else the mesh that `u` is split over.

    Returns:
      The tiles with their halos. Of a size that does not divide, the last tile's ghost cells
      follow its last cell; what comes after them, and tiles beyond, is no part of the field.

    Raises:
      ValueError: the halo is wider than a tile, a boundary is unknown, or the fields differ in
        shape.
    """
    what = "halo_exchange"
    fields, tree = jax.tree.flatten(u)
    check_fields(what, fields)
    wafer, along = geometry.home(u, spec, wafer)
    widths = geometry.widths(width, along, what, "width")
    shape = fields[0].shape
    parts = (1,) * len(shape)
    if wafer is not None:
        parts = tuple(layout.parts(P(entry), wafer) for entry in along)
    lines = tuple(
        geometry.of_field(shape, along, side, parts, what)
        for side in geometry.by_field(boundary, u)
    )
    check_room(what, lines, widths)
    kernel = functools.partial(_per_pe, lines=lines, widths=widths, corners=corners)
    if wafer is None:
        out = program_of(kernel)(*fields)
    else:
        laid = P(*along)
        padded = [layout.pad(f, laid, wafer, None) for f in fields]
        out = wafer.map(kernel, in_specs=laid, out_specs=laid)(*padded)
    return jax.tree.unflatten(tree, out)


def halo_tile(
    tile: Any,
    along: Along,
    width: Width | Sequence[Width],
    *,
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    corners: bool = True,
    size: Sequence[int] | None = None,
) -> Any:
    """This PE's `tile` with its halo around it; for kernels and for your own `jax.shard_map`.

    Args:
      tile: a tile, or a pytree of tiles of one shape.
      along: for each dimension the axis that it is split over, None, or a tuple of axes: the
        entries of the `PartitionSpec`.
      width: as in `halo_exchange`.
      boundary: as in `halo_exchange`.
      corners: as in `halo_exchange`.
      size: cells of the whole field along each dimension; by default all tiles are full.

    Raises:
      ValueError: as `halo_exchange`.
    """
    what = "halo_tile"
    fields, tree = jax.tree.flatten(tile)
    check_fields(what, fields)
    lines = tile_lines(what, tile, along, boundary, size)
    widths = geometry.widths(width, along, what, "width")
    check_room(what, lines, widths)
    return jax.tree.unflatten(tree, _per_pe(*fields, lines=lines, widths=widths, corners=corners))


def crop(
    tiles: Any,
    width: Width | Sequence[Width],
    *,
    shape: Sequence[int] | None = None,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Any:
    """The field whose tiles with halos are `tiles`: the inverse of `halo_exchange`.

    Nothing is sent.

    Args:
      tiles: what `halo_exchange` gave, or a pytree of such.
      width: of the halo, as given there.
      shape: of the field, where its sizes do not divide.
      spec: as given there.
      wafer: as given there.

    Raises:
      ValueError: the tiles are smaller than their halos.
    """
    fields, tree = jax.tree.flatten(tiles)
    wafer, along = geometry.home(tiles, spec, wafer)
    widths = geometry.widths(width, along, "crop", "width")
    kernel = functools.partial(_inside, widths=widths)
    if wafer is None:
        out = program_of(kernel)(*fields)
    else:
        laid = P(*along)
        out = wafer.map(kernel, in_specs=laid, out_specs=laid)(*fields)
        if shape is not None:
            out = [layout.crop(f, tuple(shape), laid, wafer) for f in out]
    return jax.tree.unflatten(tree, out)


def tile_lines(
    what: str, tile: Any, along: Along, boundary: Any, size: Sequence[int] | None
) -> tuple[tuple[Line, ...], ...]:
    """For each field of `tile` its lines, as the mesh at hand says."""
    first = jax.tree.leaves(tile)[0]
    if len(along) != first.ndim:
        raise ValueError(
            f"{what}: along has {len(along)} entries, the tile {first.ndim} dimensions"
        )
    parts = geometry.parts_along(along)
    full = tuple(n * p for n, p in zip(first.shape, parts, strict=True))
    size = full if size is None else tuple(size)
    lines = tuple(
        geometry.of_field(size, along, side, parts, what)
        for side in geometry.by_field(boundary, tile)
    )
    if tuple(line.tile for line in lines[0]) != first.shape:
        raise ValueError(
            f"{what}: a tile is {first.shape}, a field of {size} over {parts} PEs has tiles of "
            f"{tuple(line.tile for line in lines[0])}"
        )
    return lines


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
    """
    slabs = [
        _Slabs(b, own, a, corners, fresh) for b, own, a in zip(buffers, lines, at, strict=True)
    ]
    for dim in range(buffers[0].ndim):
        for high in (False, True):
            moving = [field for field in slabs if field.moves(dim, high)]
            if not moving:
                continue
            sent = [field.cut(dim, high) for field in moving]
            wraps = any(field.lines[dim].periodic for field in moving)
            along = moving[0].lines[dim].names
            got = message.shift_together(sent, along, -1 if high else 1, periodic=wraps)
            for field, slab in zip(moving, got, strict=True):
                field.receive(dim, high, slab)
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
                blocks[i] = ends.fill_side(
                    blocks[i], dim, True, own, at=at, margins=widths, radius=widths
                )
    return blocks


def _arrivals(blocks, lines, dim, high, width):
    """What lies beyond one side of each block: the neighbor's cells, or at an end ghost cells."""
    if width == 0:
        return None
    ghosts = [
        None if own[dim].periodic and own[dim].parts > 1
        else ends.ghost_cells(b, dim, own[dim], high, 0, width, width)
        for b, own in zip(blocks, lines, strict=True)
    ]  # fmt: skip
    line = lines[0][dim]
    if line.parts == 1:
        return ghosts
    begin = 0 if high else line.tile - width
    sent = [lax.slice_in_dim(b, begin, begin + width, axis=dim) for b in blocks]
    wraps = any(own[dim].periodic for own in lines)
    got = message.shift_together(sent, line.names, -1 if high else 1, periodic=wraps)
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

    def cut(self, dim: int, high: bool) -> jax.Array:
        """The cells that lie beyond a side of the neighbor's tile."""
        width = self.at[dim][high]
        begin = 0 if high else self.lines[dim].tile - width  # in the tile
        starts, shape = self._span(dim)
        starts[dim], shape[dim] = self.at[dim][0] + begin, width
        if not (self.fresh and self.corners):
            return lax.slice(self.buffer, starts, _sum(starts, shape))
        low = [pair[0] for pair in self.at]
        end = _sum(low, [line.tile for line in self.lines])
        low[dim], end[dim] = starts[dim], starts[dim] + width
        slab = lax.slice(self.buffer, low, end)
        for earlier in range(dim):
            around = [self.received.get((earlier, side)) for side in (False, True)]
            before, after = (
                [] if s is None else [lax.slice_in_dim(s, begin, begin + width, axis=dim)]
                for s in around
            )
            slab = jnp.concatenate([*before, slab, *after], earlier) if before or after else slab
        return slab

    def receive(self, dim: int, high: bool, slab: jax.Array) -> None:
        if self.fresh:
            self.received[dim, high] = slab
        else:
            self._write(dim, high, slab)

    def written(self) -> jax.Array:
        # The last to arrive is written first: what it waited for has been cut by then.
        for (dim, high), slab in reversed(self.received.items()):
            self._write(dim, high, slab)
        return self.buffer

    def _write(self, dim: int, high: bool, slab: jax.Array) -> None:
        starts, _ = self._span(dim)
        starts[dim] = self.at[dim][0] + self.lines[dim].tile if high else 0
        self.buffer = lax.dynamic_update_slice(self.buffer, slab, starts)

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


def check_room(
    what: str, lines: Sequence[Sequence[Line]], widths: Sequence[tuple[int, int]], name="width"
) -> None:
    """Raises ValueError where a halo does not fit into the tiles that it comes from."""
    for line_of in lines:
        for dim, (line, pair) in enumerate(zip(line_of, widths, strict=True)):
            _check_line(what, dim, line, pair, name)


def _per_pe(*fields, lines, widths, corners):
    at = [widths] * len(fields)
    buffers = [padded(f, widths) for f in fields]
    buffers = exchange(buffers, lines, at, corners=corners, fresh=True)
    return [
        ends.fill(b, own, at=widths, margins=widths, radius=widths, corners=corners)
        for b, own in zip(buffers, lines, strict=True)
    ]


def _inside(*tiles, widths):
    return [lax.slice(t, [low for low, _ in widths], _ends(t.shape, widths)) for t in tiles]


def _ends(shape, widths):
    return [size - high for size, (_, high) in zip(shape, widths, strict=True)]


def check_fields(what: str, fields: Sequence[jax.Array]) -> None:
    """Raises ValueError where there is no field, or one that differs in shape."""
    if not fields:
        raise ValueError(f"{what}: there is no field")
    for field in fields:
        if jnp.shape(field) != jnp.shape(fields[0]):
            raise ValueError(
                f"{what}: the fields have shapes {[jnp.shape(f) for f in fields]}; they must be "
                "alike, so call it for each shape"
            )


def _check_line(what: str, dim: int, line: Line, pair: tuple[int, int], name: str) -> None:
    for rule, width in zip((line.low, line.high), pair, strict=True):
        # A cell of one's own at the mirror is needed besides those that are reflected.
        most = line.rest - (rule == "reflect")
        needed = line.parts > 1 or not isinstance(rule, float)
        if rule in ("edge", "fixed") and line.parts == 1:
            needed = False
        if needed and width > most:
            raise ValueError(
                f"{what}: {name} of dimension {dim} is {pair}, and the smallest of its "
                f"{line.parts} tiles has {line.rest} cells: {most} is the largest with boundary "
                f"{rule!r}; use fewer PEs along {line.names or 'it'}"
            )
    if line.periodic and line.size != line.parts * line.tile and line.parts > 1:
        raise ValueError(
            f"{what}: dimension {dim} is periodic, and its {line.size} cells do not divide by the "
            f"{line.parts} PEs along {line.names}; use a size that does"
        )
