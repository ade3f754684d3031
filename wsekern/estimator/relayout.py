"""Moves of whole arrays outside kernels: changes of layout, shifts by cells, sums over PEs.

A change of layout is charged where it costs most: at the links across the middle of the wafer.
Elementwise work is that of the busiest PE. How an array lies is for `layouts` to say.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from wsekern.estimator.cost import Work, width_of
from wsekern.estimator.links import around_defects, loads, price
from wsekern.estimator.specs import Spec, is_coarser, is_small, parts_along, tile_of
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer


def relayout_move(aval: Any, wafer: Wafer) -> price.PricedMove:
    """The move that lays an array out anew: half of its words cross the middle, either way."""
    return move_anywhere(words_of(aval), wafer)


def words_of(aval: Any) -> float:
    """32-bit words of an array."""
    return math.prod(aval.shape) * width_of(aval) / 4


def move_anywhere(words: float, wafer: Wafer) -> price.PricedMove:
    """The move of words that lie on all PEs to PEs that have nothing to do with where they lie."""
    assert wafer.machine is not None
    # As many links cross the middle as the shorter side has PEs; each carries an even share.
    side = min(wafer.height, wafer.width)
    load = words / (2 * side)
    # The farthest pair of PEs is in opposite corners; a word takes half of that way on average.
    far = (wafer.height + wafer.width - 2) * wafer.machine.hop_cycles
    move = price.PricedMove(
        "relayout",
        words / (wafer.height * wafer.width),
        {direction: load for direction in "NESW"},
        far + 2 * wafer.machine.ramp_cycles + 1,
        hops=words / (wafer.height * wafer.width) * far / 2,
        tile=load,
        pattern=loads.LinkPattern(kind="relayout"),
    )
    return around_defects.stretch_along_lines(
        move, (ROWS, COLS), sizes_of(wafer), wafer.machine, wafer.placement
    )


def spread_work(
    work: Work, shape: Sequence[int], spec: Spec | None, assumed: bool, wafer: Wafer
) -> Work:
    """The part of the busiest PE of work on whole arrays.

    Args:
      work: on all elements.
      shape: of the largest array of the operation.
      spec: how this lies; None: evenly spread.
      assumed: whether that was assumed; then wafers share the array, too.
      wafer: over which it is spread.
    """
    pes, elements = wafer.size, math.prod(shape)
    # What lies whole on several PEs is worked through by each.
    if is_small(shape, wafer):
        share = 1.0
    elif spec is None:
        share = -(-elements // pes) / elements
    else:
        tile = math.prod(tile_of(shape, spec, wafer))
        share = -(-tile // (wafer.wafers if assumed else 1)) / elements
    # Each PE starts all instructions, however few elements it has.
    cycles = work.starts + (work.cycles - work.starts) * share
    # Operations are counted once, whoever repeats them.
    return work._replace(cycles=cycles, flops=work.flops / pes, port_bytes=work.port_bytes * share)


def shift_move(
    shape: Sequence[int], width: int, spec: Spec, dimension: int, cells: int, wafer: Wafer
) -> price.PricedMove | None:
    """The move of an array by `cells` cells along a dimension that is split; None if it is not.

    A slice that leaves out a rim, a roll and a pad are such moves: on every PE the cells at one end
    of the tile come from the next one. Where more cells move than a tile has, they go further.

    Args:
      shape: of the array.
      width: bytes of an element.
      spec: how the array lies.
      dimension: along which it moves.
      cells: by how many; toward lower indices if positive.
      wafer: over which it is spread.
    """
    machine, sizes = wafer.machine, sizes_of(wafer)
    axes = tuple(a for a in spec[dimension] if sizes[a] > 1)
    if not cells or not axes:
        return None
    assert machine is not None
    # Over both axes a dimension runs along x, and from the end of a row of PEs to the next row.
    axis = axes[-1]
    tile = [-(-n // parts_along(entry, wafer)) for n, entry in zip(shape, spec, strict=True)]
    across = math.prod(n for d, n in enumerate(tile) if d != dimension) * width / 4
    pes = min(-(-abs(cells) // max(1, tile[dimension])), sizes[axis] - 1)
    words = min(abs(cells), tile[dimension]) * across
    move = price.price_shift(axis, -pes if cells > 0 else pes, words, sizes, machine)
    return around_defects.stretch_along_lines(move, (axis,), sizes, machine, wafer.placement)


def flood_move(words: float, axes: Collection[str], wafer: Wafer) -> price.PricedMove | None:
    """The move that gives every PE along `axes` all words that they have together.

    Args:
      words: that each PE has afterwards.
      axes: of the PEs.
      wafer: of these PEs.
    """
    machine, sizes = wafer.machine, sizes_of(wafer)
    assert machine is not None
    along = tuple(a for a in (ROWS, COLS) if a in axes)
    move = price.price_flood(along, words, sizes, machine)
    if move is None:
        return None
    return around_defects.stretch_along_lines(move, along, sizes, machine, wafer.placement)


def tile_move(aval: Any, spec: Spec, kept: Spec, wafer: Wafer) -> list[price.PricedMove]:
    """The move that gives every PE the tile that it needs of an array; none if it has that.

    Args:
      aval: of the array.
      spec: how it lies.
      kept: how it is to lie.
      wafer: over which it is spread.
    """
    if is_coarser(spec, kept):
        return []
    axes = {axis for entry in spec for axis in entry} - {axis for entry in kept for axis in entry}
    if not axes:  # they are exchanged, and cells cross the wafer
        return [relayout_move(aval, wafer)]
    move = flood_move(math.prod(tile_of(aval.shape, kept, wafer)) * width_of(aval) / 4, axes, wafer)
    return [] if move is None else [move]


def sum_move(
    shape: Sequence[int],
    width: int,
    axes: Sequence[str],
    parts: int,
    wafer: Wafer,
    occupied: Mapping[str, int] | None = None,
) -> price.PricedMove | None:
    """A sum, or another reduction, over the PEs along `axes`; None if there is nobody to add to.

    Args:
      shape: of the whole result.
      width: bytes of an element.
      axes: of the PEs.
      parts: into how many parts the result is cut.
      wafer: over which it is spread.
      occupied: PEs along some of these axes that have anything to add; by default all.
    """
    across = tuple(a for a in axes if a in (ROWS, COLS))
    if not across:
        return None
    # Each PE sums its own tile first, so that the tiles that move have the result's size.
    machine, sizes = wafer.machine, sizes_of(wafer) | dict(occupied or {})
    assert machine is not None
    words = math.prod(shape) * width / 4 / parts
    move = price.price_reduction("xla", across, max(words, 1.0), sizes, machine)
    if move is None:
        return None
    return around_defects.stretch_along_lines(move, across, sizes, machine, wafer.placement)


def sizes_of(wafer: Wafer) -> dict[str, int]:
    """PEs along each axis."""
    return {axis: wafer.axis_size(axis) for axis in wafer.axes}
