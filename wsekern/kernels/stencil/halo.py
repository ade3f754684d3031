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

from wsekern.kernels.stencil import boundary, geometry
from wsekern.kernels.stencil.exchange import exchange, padded
from wsekern.kernels.stencil.geometry import Boundary, Line, Width
from wsekern.wafer import layout
from wsekern.wafer.program import local_program
from wsekern.wafer.wafer import Wafer

Along = P | Sequence[None | str | tuple[str, ...]]


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
    inverse. A PE sends one message to each neighbor, in one step a dimension.

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
        out = local_program(kernel)(*fields)
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
    widths = geometry.widths(width, (*along,), what, "width")
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
        out = local_program(kernel)(*fields)
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
    along = (*along,)
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
    return boundary.fill(buffers, lines, at=widths, margins=widths, radius=widths, corners=corners)


def _inside(*tiles, widths):
    return [lax.slice(t, [low for low, _ in widths], _ends(t.shape, widths)) for t in tiles]


def _ends(shape, widths):
    return [size - high for size, (_, high) in zip(shape, widths, strict=True)]


def check_fields(what: str, fields: Sequence[Any]) -> None:
    """Raises ValueError where there is no field, or one that differs in shape."""
    if not fields:
        raise ValueError(f"{what}: there is no field")
    shapes = [jnp.shape(field) for field in fields]
    if len(set(shapes)) == 1:
        return
    mend = "call it for each shape"
    if len({len(shape) for shape in shapes}) == 1:
        spans = [max(sizes) - min(sizes) for sizes in zip(*shapes, strict=True)]
        if max(spans) == 1:
            dims = [dim for dim, span in enumerate(spans) if span]
            mend = (
                f"along dimension {', '.join(map(str, dims))} some have one face more than there "
                "are cells: keep each cell with the face behind it, leave the first face out, and "
                "give what it is as that field's boundary (docs/stencils.md, staggered grids)"
            )
    raise ValueError(f"{what}: the fields have shapes {shapes}; they must be alike: {mend}")


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
