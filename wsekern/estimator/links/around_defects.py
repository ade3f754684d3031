"""The cost of a move where PEs lie around faulty ones, or on folded lines.

A shift takes the hops of its farthest tile, over all lines of the wafer. A reduction, a flood or a
gather goes down a line from PE to PE, and its way is stretched as much as that of the longest line.
Where a move along one axis has to go sideways, it takes the sideways links too, as often as the
busiest of them is crossed.
"""

from __future__ import annotations

import re
from typing import Any

from jax.extend.core import JaxprEqn

from wsekern.estimator.links import price
from wsekern.fabric.reductions import choice
from wsekern.hardware import Machine
from wsekern.wafer.axes import WAFERS
from wsekern.wafer.placement.place import Placement
from wsekern.wafer.placement.routes import routes, sideways

_REDUCE = re.compile(r"reduce by (\w+)")


def price_move(
    equation: JaxprEqn, sizes: dict[str, int], machine: Machine, placement: Placement | None
) -> price.PricedMove | None:
    """As `price.price_move`, with the hops of a placement (None: PEs lie side by side)."""
    move = price.price_move(equation, sizes, machine)
    if move is None or placement is None:
        return move
    axes = price.axes_of(equation)
    if move.kind == "shift":
        return _shift(move, axes, equation.params["perm"], machine, placement)
    return stretch_along_lines(move, axes, sizes, machine, placement, price.root_of(equation))


def stretch_along_lines(
    move: price.PricedMove,
    axes: tuple[str, ...],
    sizes: dict[str, int],
    machine: Machine,
    placement: Placement | None,
    root: int | None = None,
) -> price.PricedMove:
    """A move down the lines along `axes`, with the hops of a placement.

    Args:
      move: its cost where PEs lie side by side.
      axes: along which it moves.
      sizes: PEs along each axis.
      machine: says what a hop costs.
      placement: where the PEs lie; None: side by side.
      root: the PE that gets a reduction's result; None: all PEs do.
    """
    if placement is None:
        return move
    axes = tuple(a for a in axes if a != WAFERS and sizes[a] > 1)
    far = _distances(move, axes, sizes, root)
    # `stretch` is a line's hops over those of a line without defects: 1.02 adds 2 % of them.
    extra = sum(hops * (placement.stretch[a] - 1) for a, hops in far.items())
    # `sideways` counts in tiles, of which the busiest link of the move carries `load` words.
    load, busy = max(move.busy.values(), default=0.0), dict(move.busy)
    for axis in axes:
        for direction, tiles in sideways(placement, axis).items():
            busy[direction] = max(busy.get(direction, 0.0), load * tiles)
    most = max((placement.stretch[a] for a in axes), default=1.0)
    return move._replace(
        busy=busy, latency=move.latency + extra * machine.hop_cycles, hops=move.hops * most
    )


def _shift(
    move: price.PricedMove,
    axes: tuple[str, ...],
    pairs: Any,
    machine: Machine,
    placement: Placement,
) -> price.PricedMove:
    if WAFERS in axes:
        return move
    taken = routes(placement, axes, tuple((int(a), int(b)) for a, b in pairs))
    latency = taken.longest * machine.hop_cycles + 2 * machine.ramp_cycles + machine.hop_cycles
    busy = {direction: tiles * move.words for direction, tiles in taken.loads.items()}
    return move._replace(busy=busy, latency=float(latency), hops=move.words * taken.mean)


def _distances(
    move: price.PricedMove, axes: tuple[str, ...], sizes: dict[str, int], root: int | None
) -> dict[str, float]:
    """Hops along each axis that follow one another, where PEs lie side by side."""
    match = _REDUCE.match(move.kind)
    whole = {axis: float(sizes[axis] - 1) for axis in axes}
    if match is None:
        return whole
    algorithm, lengths = match[1], [sizes[a] for a in axes]
    # Neighbors on a folded ring are two hops apart, and a part goes round twice: for the sum and
    # for the gather.
    if algorithm == "ring":
        return {axis: 4 * hops for axis, hops in whole.items()}
    at = choice.root_of(algorithm, lengths) if root is None else root
    places = dict(zip(axes, choice.places_of(at, lengths), strict=True))
    far = {a: float(max(place, sizes[a] - 1 - place)) for a, place in places.items()}
    if algorithm == "snake":  # through every PE of every row, then on to the next
        far[axes[-1]] *= sizes[axes[0]]
    # Without a root, the result goes back out as far as the farthest tile came.
    return {axis: hops * (1 + (root is None)) for axis, hops in far.items()}
