"""Loops: until which trip they are walked, what they leave unchanged, and how scanned arrays lie.

A scan reads and writes one row a trip. All PEs work on each row, so that an array whose rows lie on
PEs of their own is laid out anew before the first trip: every PE gets its part of every row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import Jaxpr

from wsekern.estimator import relayout, trace
from wsekern.estimator.clocks import Clocks
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.specs import Spec, assumed_spec, parts_along, tile_of
from wsekern.estimator.variable_state import VariableState
from wsekern.wafer.wafer import Wafer

_WALKED_TRIPS = 12  # of a loop whose trips never come to take equally long
# By how much a trip of a loop moved the clock of each lane, and when each carried value is ready.
_Pace = tuple[dict[str, float], list[float]]


def repeat(
    clocks: Clocks,
    line: str,
    run_trip: Callable[[Sequence[VariableState]], list[VariableState]],
    carried: Sequence[VariableState],
    times: int,
) -> tuple[list[VariableState], list[VariableState]]:
    """What a loop carries out of its last trip, and all results of the last trip walked.

    Trips are walked until one is like the trip before. For 100 trips whose clock stands at

      130, 250, 370       after 1, 2 and 3 trips, trip 3 took as long as trip 2: 120 cycles
      370 + 97 * 120      is the clock after all, and each total grows by its share of trip 3

    Args:
      clocks: which the trips move on.
      line: of the source, of the loop.
      run_trip: walks one trip, from the states that it is handed to those of the trip's results.
      carried: the states that the first trip is handed.
      times: how many trips.
    """
    outs = list(carried)
    pace: _Pace | None = None
    for trip in range(times):
        totals, busy_until = clocks.totals.copy(), dict(clocks.busy_until)
        outs = run_trip(carried)
        now = clocks.busy_until
        advance = {lane: cycle - busy_until.get(lane, 0.0) for lane, cycle in now.items()}
        new = outs[: len(carried)]
        later = [a.ready - b.ready for a, b in zip(new, carried, strict=True)]
        carried = new
        if _is_steady(pace, (advance, later)) or trip + 1 == _WALKED_TRIPS:
            left = times - trip - 1
            clocks.repeat(left, advance, totals, line)
            carried = [
                v._replace(ready=v.ready + by * left) for v, by in zip(carried, later, strict=True)
            ]
            break
        pace = advance, later
    return list(carried), outs


def static_in_every_trip(
    body: Jaxpr,
    constants: Sequence[VariableState],
    carried: Sequence[VariableState],
    scanned: Sequence[VariableState],
) -> list[VariableState]:
    """What is carried, marked static only if it stays so: a counter does, a tile does not.

    A value that loses the mark can cost others theirs in the next trip, hence the loop:

      (i, a, b) -> (i + 1, b, tile)   all start static, as zeros do
      after one trip b is not         since it became a tile
      after two trips a is not        since it became b
    """
    while True:
        static = [v.static for v in (*constants, *carried, *scanned)]
        outs = trace.static_results(body, static)[: len(carried)]
        new = [v._replace(static=v.static and out) for v, out in zip(carried, outs, strict=True)]
        if new == list(carried):
            return new
        carried = new


def lay_out_rows(
    aval: Any, state: VariableState, wafer: Wafer
) -> tuple[Spec | None, list[PricedMove]]:
    """How a scanned array lies so that every PE has its part of every row, and the move there.

    Rows that lie on all PEs already stay: layers' weights [L, D, F], cut along D and F.

    x[4096, 512] along y and x of 128 x 128 PEs   lies as (None, ("y", "x")) afterwards

    Args:
      aval: of the array.
      state: what is known of it.
      wafer: over which it is spread.
    """
    if wafer.size == 1:
        return state.spec, []
    spec = assumed_spec(aval.shape, wafer) if state.spec is None else state.spec
    if state.before is None and parts_along(spec[0], wafer) == 1:
        return state.spec, []
    wanted = ((), *assumed_spec(aval.shape[1:], wafer))
    if state.before is not None:  # a reshaped array is laid out in its new order at once
        moves = [relayout.relayout_move(aval, wafer)]
    else:
        moves = relayout.tile_move(aval, spec, wanted, wafer)
    # Rows with fewer elements than PEs crowd on some of these: all words of theirs take one ramp.
    tile = math.prod(tile_of(aval.shape, wanted, wafer)) * relayout.words_of(aval)
    tile /= max(1, math.prod(aval.shape))
    busiest = [{way: max(load, tile) for way, load in move.busy.items()} for move in moves]
    return wanted, [move._replace(busy=b) for move, b in zip(moves, busiest, strict=True)]


def stack(
    state: VariableState, aval: Any, row: VariableState, length: int, wafer: Wafer
) -> VariableState:
    """The state of an array that a scan stacked.

    Args:
      state: without a layout.
      aval: of a row.
      row: what is known of the last row.
      length: how many rows there are.
      wafer: over which the rows are spread.
    """
    spec = assumed_spec(aval.shape, wafer) if row.spec is None else row.spec
    # Where every PE has whole rows, it may keep those that any layout asks it for.
    if row.static or not any(spec):
        return state
    guessed = row.spec is None or row.assumed
    if guessed and parts_along(assumed_spec((length, *aval.shape), wafer)[0], wafer) == 1:
        return state if row.spec is None else state._replace(spec=((), *spec), assumed=True)
    return state._replace(spec=((), *spec), from_scan=True)


def _is_steady(before: _Pace | None, now: _Pace) -> bool:
    if before is None or before[0].keys() != now[0].keys():
        return False
    pairs = [(before[0][lane], now[0][lane]) for lane in now[0]]
    pairs += list(zip(before[1], now[1], strict=True))
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(a)) for a, b in pairs)
