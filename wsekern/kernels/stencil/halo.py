"""Halo exchange: each tile with the nearest cells of its neighbors around it.

Corners arrive in two phases, as in D. Kjolstad and M. Snir, "Ghost Cell Pattern", 2010: the message
of a dimension holds what the dimensions before it have brought, so no PE sends to one diagonally
across. All fields go in one message to each neighbor, which is written into padding.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from wsekern.kernels.stencil import boundary, geometry
from wsekern.kernels.stencil.buffers import Fields, Mode, Pairs, Tile, cut_box, pad_tile
from wsekern.kernels.stencil.exchange import exchange
from wsekern.kernels.stencil.geometry import Axes, Boundary, Line, Lines, Width
from wsekern.wafer import layout
from wsekern.wafer.field_layout import field_layout
from wsekern.wafer.program import local_program
from wsekern.wafer.wafer import Wafer

Along = P | Sequence[Axes]


def halo_exchange(
    u: Fields,
    width: Width | Sequence[Width],
    *,
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    corners: bool = True,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Fields:
    """The tiles of `u`, each with its halo, side by side as one array.

    A dimension of `N` cells over `p` PEs becomes one of `p * (N/p + low + high)`; `crop` is the
    inverse. A PE sends one message, of all fields, to each neighbor: a dimension after the other,
    so that corners come in two steps. Differentiable, forward and reverse.

    Args:
      u: a field, or a pytree of fields of one shape; of any floating or integer dtypes.
      width: cells of the halo: one number for every dimension that is split, or a number or a pair
        (low, high) for each dimension.
      boundary: what lies beyond the field: "periodic", "zero", a number, "edge" (the last cell
        again), "reflect" (about the last cell), "symmetric" (about its outer face), "fixed" (as
        "edge"; `stencil` holds the rim still), or a function that makes the ghost cells from the
        cells nearest to that side, as many as the halo is wide, in order. One for all sides, or one
        for each dimension, or (low, high) for each dimension; or a dict of these by a field's name.
      corners: whether diagonal neighbors' cells come too. Without them all messages go in one
        step, and corners hold nothing of use.
      spec: over which axes the dimensions lie. By default as `u` is laid out, else the first
        dimension along y and over the wafers, and the second along x.
      wafer: where to run; by default the current wafer, or else the mesh that `u` is split over.
        Inside jit, grad and vmap, how `u` is split is known on Explicit axes alone.

    Returns:
      The tiles with their halos. Where a size does not divide, the last tile's ghost cells follow
      its last cell. What comes after them, and tiles after that one, are no part of the field.

    Raises:
      ValueError: the halo is wider than a tile, a boundary is unknown, the fields differ in shape,
        or inside jit, grad or vmap neither a wafer is given nor the split of `u` known.
    """
    fields, tree = jax.tree.flatten(u)
    wafer, along, lines, widths = lay_out(
        "halo_exchange", u, boundary, spec, wafer, width, "width", shape_depends=True
    )
    kernel = functools.partial(_per_pe, lines=lines, widths=widths, corners=corners)
    if wafer is None:
        out = local_program(kernel)(*fields)
    else:
        # Padding repeats the last cells, so no value stands there that the field does not have.
        spec = P(*along)
        padded = [layout.pad(f, spec, wafer, None) for f in fields]
        out = wafer.map(kernel, in_specs=spec, out_specs=spec)(*padded)
    return jax.tree.unflatten(tree, out)


def halo_tile(
    tile: Fields,
    along: Along,
    width: Width | Sequence[Width],
    *,
    boundary: Boundary | Sequence[Any] | dict[Any, Any] = "zero",
    corners: bool = True,
    size: Sequence[int] | None = None,
) -> Fields:
    """This PE's `tile` with its halo around it; for kernels and for your own `jax.shard_map`.

    A PE sends one message, of all fields, to each neighbor: a dimension after the other, so that
    corners come in two steps. It receives a slab of `width` cells from each side, across the whole
    tile, and holds the tile once more with its halo. Differentiable, forward and reverse.

    Args:
      tile: a tile, or a pytree of tiles of one shape.
      along: for each dimension the axis that it is split over, None, or a tuple of axes: the
        entries of the `PartitionSpec`.
      width: cells of the halo: one number for every dimension that is split, or a number or a pair
        (low, high) for each dimension.
      boundary: what lies beyond the field: "periodic", "zero", a number, "edge" (the last cell
        again), "reflect" (about the last cell), "symmetric" (about its outer face), "fixed" (as
        "edge"), or a function that makes the ghost cells from the cells nearest to that side, as
        many as the halo is wide, in order. One for all sides, or one for each dimension, or (low,
        high) for each dimension; or a dict of these by a field's name.
      corners: whether diagonal neighbors' cells come too. Without them all messages go in one
        step, and corners hold nothing of use.
      size: cells of the whole field along each dimension; by default all tiles are full.

    Raises:
      ValueError: the halo is wider than a tile, a boundary is unknown, or the tiles have several
        shapes.
    """
    operation = "halo_tile"
    fields, tree = jax.tree.flatten(tile)
    lines = tile_lines(operation, tile, along, boundary, size)
    widths = geometry.width_pairs(width, (*along,), operation, "width")
    check_room(operation, lines, widths)
    return jax.tree.unflatten(tree, _per_pe(*fields, lines=lines, widths=widths, corners=corners))


def crop(
    tiles: Fields,
    width: Width | Sequence[Width],
    *,
    shape: Sequence[int] | None = None,
    spec: P | None = None,
    wafer: Wafer | None = None,
) -> Fields:
    """The field whose tiles with halos are `tiles`: the inverse of `halo_exchange`.

    Nothing is sent.

    Args:
      tiles: the result of `halo_exchange`, an array or a pytree of arrays.
      width: of the halo, as it was given to `halo_exchange`.
      shape: of the field, where its sizes do not divide.
      spec: over which axes the dimensions lie, as it was given to `halo_exchange`.
      wafer: where to run, as it was given to `halo_exchange`.

    Raises:
      ValueError: the tiles are smaller than their halos, or inside jit, grad or vmap neither a
        wafer is given nor the split of `tiles` known.
    """
    fields, tree = jax.tree.flatten(tiles)
    wafer, along, _ = field_layout("crop", fields, spec, wafer, shape_depends=True)
    widths = geometry.width_pairs(width, along, "crop", "width")
    kernel = functools.partial(_crop_per_pe, widths=widths)
    if wafer is None:
        out = local_program(kernel)(*fields)
    else:
        spec = P(*along)
        out = wafer.map(kernel, in_specs=spec, out_specs=spec)(*fields)
        if shape is not None:
            out = [layout.crop(f, tuple(shape), spec, wafer) for f in out]
    return jax.tree.unflatten(tree, out)


class WholeFields(NamedTuple):
    """Whole fields as a wafer holds them."""

    wafer: Wafer | None
    along: tuple[Axes, ...]  # the axes of each dimension
    lines: tuple[Lines, ...]  # for each field
    widths: Pairs  # of the halo, for each dimension


def lay_out(
    operation: str,
    fields: Fields,
    boundary: Any,
    spec: P | None,
    wafer: Wafer | None,
    width: Width | Sequence[Width],
    name: str,
    *,
    shape_depends: bool,
) -> WholeFields:
    """How whole fields lie on a wafer, with room for their halos.

    Args:
      operation: the public function, for messages.
      fields: a field, or a pytree of them.
      boundary: as for `halo_exchange`.
      spec: as for `halo_exchange`.
      wafer: as for `halo_exchange`.
      width: of the halo, as for `halo_exchange`.
      name: what the operation calls `width`.
      shape_depends: whether the result's shape depends on how the fields are split.

    Raises:
      ValueError: there is no field, fields differ in shape, a boundary is unknown, a halo does not
        fit into the tiles that it comes from, or the result's shape depends on a split that is not
        known.
    """
    leaves = jax.tree.leaves(fields)
    _check_fields(operation, leaves)
    layout = field_layout(operation, leaves, spec, wafer, shape_depends=shape_depends)

    def along(axes: tuple[Axes, ...]) -> WholeFields:
        lines = _whole_lines(operation, fields, boundary, layout.wafer, axes)
        widths = geometry.width_pairs(width, axes, operation, name)
        check_room(operation, lines, widths, name)
        return WholeFields(layout.wafer, axes, lines, widths)

    try:
        return along(layout.along)
    except ValueError:
        if not layout.chosen:
            raise
    # Nobody asked for that split: small fields are whole on every device.
    return along((None,) * len(layout.along))


def _whole_lines(
    operation: str,
    fields: Fields,
    boundary: Any,
    wafer: Wafer | None,
    along: tuple[Axes, ...],
) -> tuple[Lines, ...]:
    shape = jnp.shape(jax.tree.leaves(fields)[0])
    # Without a wafer the axes still say which dimensions have a halo; none is split.
    pes = (1,) * len(shape)
    if wafer is not None:
        pes = tuple(layout.parts(P(entry), wafer) for entry in along)
    return tuple(
        geometry.field_lines(shape, along, sides, pes, operation)
        for sides in geometry.option_by_field(boundary, fields)
    )


def tile_lines(
    operation: str, tile: Fields, along: Along, boundary: Any, size: Sequence[int] | None
) -> tuple[Lines, ...]:
    """For each field of `tile` its lines, by the mesh in whose kernel this is traced.

    Raises:
      ValueError: there is no field, fields differ in shape, a boundary is unknown, or `along` or
        `size` does not fit the tile.
    """
    leaves = jax.tree.leaves(tile)
    _check_fields(operation, leaves)
    first, along = leaves[0], (*along,)
    if len(along) != first.ndim:
        raise ValueError(
            f"{operation}: along has {len(along)} entries, the tile {first.ndim} dimensions"
        )
    pes = geometry.pes_along(along)
    # Inside a kernel only the tile is known: the field has as many cells as its tiles hold.
    full = tuple(n * p for n, p in zip(first.shape, pes, strict=True))
    size = full if size is None else tuple(size)
    lines = tuple(
        geometry.field_lines(size, along, sides, pes, operation)
        for sides in geometry.option_by_field(boundary, tile)
    )
    if tuple(line.tile for line in lines[0]) != first.shape:
        raise ValueError(
            f"{operation}: a tile is {first.shape}, a field of {size} over {pes} PEs has tiles of "
            f"{tuple(line.tile for line in lines[0])}"
        )
    return lines


def check_room(
    operation: str, lines: Sequence[Lines], widths: Sequence[tuple[int, int]], name: str = "width"
) -> None:
    """Raises ValueError where a halo does not fit into the tiles that it comes from."""
    for field in lines:
        for dim, (line, pair) in enumerate(zip(field, widths, strict=True)):
            _check_line(operation, dim, line, pair, name)


def _per_pe(*fields: Tile, lines: tuple[Lines, ...], widths: Pairs, corners: bool) -> list[Tile]:
    # Ghost cells come after the exchange: at an open end they overwrite whatever arrived there.
    buffers = [pad_tile(f, widths) for f in fields]
    paddings = [widths] * len(fields)
    buffers = exchange(buffers, lines, paddings, mode=Mode.PADDED, corners=corners)
    return boundary.fill(
        buffers,
        lines,
        padding=widths,
        margins=widths,
        radius=widths,
        mode=Mode.PADDED,
        corners=corners,
    )


def _crop_per_pe(*tiles: Tile, widths: Pairs) -> list[Tile]:
    inside = [
        tuple((0, n - low - high) for n, (low, high) in zip(tile.shape, widths, strict=True))
        for tile in tiles
    ]
    none = ((0, 0),) * len(widths)
    return [cut_box(tile, widths, box, none) for tile, box in zip(tiles, inside, strict=True)]


def _check_fields(operation: str, fields: Sequence[Shaped[Array | np.ndarray, "..."]]) -> None:
    if not fields:
        raise ValueError(f"{operation}: there is no field")
    shapes = [jnp.shape(field) for field in fields]
    if len(set(shapes)) == 1:
        return
    # Faces of a staggered grid are the usual reason, and have a usual answer.
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
    raise ValueError(f"{operation}: the fields have shapes {shapes}; they must be alike: {mend}")


def _check_line(operation: str, dim: int, line: Line, pair: tuple[int, int], name: str) -> None:
    for rule, width in zip(line.ends(), pair, strict=True):
        # "reflect" mirrors about the last cell, which is not reflected itself but has to be there.
        most = line.last_cells - (rule == "reflect")
        # Split, a halo comes from one neighbor's tile. Not split, a constant reads no cell.
        needed = line.split or not isinstance(rule, float)
        if rule in ("edge", "fixed") and not line.split:
            needed = False  # one cell, repeated
        if needed and width > most:
            raise ValueError(
                f"{operation}: {name} of dimension {dim} is {pair}, and the smallest of its "
                f"{line.pes} tiles has {line.last_cells} cells: {most} is the largest with "
                f"boundary {rule!r}; use fewer PEs along {line.axes or 'it'}"
            )
    # The last tile would end in padding, and its neighbor would get that instead of cells.
    if line.periodic and line.size != line.pes * line.tile and line.split:
        raise ValueError(
            f"{operation}: dimension {dim} is periodic, and its {line.size} cells do not divide by "
            f"the {line.pes} PEs along {line.axes}; use a size that does"
        )
