"""This file is what a program costs on a wafer, before anyone has one: `wk.estimate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from wsekern.estimator import memory, trace
from wsekern.estimator.cost import DEFAULT, Constants, size_of, width_of
from wsekern.estimator.result import Estimate
from wsekern.estimator.schedule import Schedule
from wsekern.hardware import ACCELERATORS
from wsekern.wafer.wafer import Wafer

if TYPE_CHECKING:
    pass


def estimate(
    function: Callable,
    *operands: Any,
    wafer: Wafer | None = None,
    clock_hz: float | None = None,
    trips: int | None = None,
    density: float = 1.0,
    constants: Constants = DEFAULT,
) -> Estimate:
    """What `function(*operands)` costs on a wafer, off its trace; nothing is computed.

    The trace is walked as one PE runs it (see `schedule`, `cost`, `links`, `memory`). An operation
    without a figure is counted as elementwise, evenly spread, and named in the result. On a wafer
    with defects, or a folded one, moves take the hops of its placement.

    Args:
      function: any jax function whose kernels go through `Wafer.map`; its gradient, a whole step.
      operands: arrays or `jax.ShapeDtypeStruct`s; pytrees of them.
      wafer: abstract or virtual; by default the one in force.
      clock_hz: cycles a second; by default the machine's own.
      trips: how often a loop runs whose length the trace does not say.
      density: the share of a product's factors that are not zero. A PE multiplies a vector by one
        factor after another, and skips those that are zero (S. Lie, Hot Chips 33, 2021); which of
        both operands they are of, and that they are spread evenly, is taken to be so.
      constants: what is fitted.

    Raises:
      ValueError: there is no wafer, or it is no machine's; a loop's length is not known; `density`
        is not from 0 to 1.
    """
    if not 0 <= density <= 1:
        raise ValueError(f"estimate: density={density} must be from 0 to 1")
    jaxpr, wafer = trace.traced("estimate", function, operands, wafer)
    if wafer.machine is None:
        raise ValueError(
            f"estimate: {wafer!r} is of devices, which have no cycles to count; give "
            f"wafer=wk.Wafer.abstract(wk.WSE3, {wafer.height}, {wafer.width})"
        )
    clock_hz = clock_hz or wafer.machine.clock_hz
    walk = Schedule(wafer, constants, clock_hz, trips, density)
    walk.run(jaxpr)
    return _found(walk, jaxpr)


def _found(walk: Schedule, jaxpr: Any) -> Estimate:
    """What a walk has counted."""
    wafer, sums = walk.wafer, walk.sums
    flops = {d: sums["flops", d] * wafer.size for d in ("float32", "float16")}
    peak = sum(n / walk.machine.fmacs_per_cycle(d) / 2 / wafer.size for d, n in flops.items())
    lines = [(*key[1:], value) for key, value in sums.items() if key[0] == "line"]
    of_host = sum(_bytes(v) for v in (*jaxpr.invars, *jaxpr.outvars))
    return Estimate(
        wafer=wafer,
        clock_hz=walk.clock_hz,
        cycles=walk.cycles,
        extra_cycles=_extra(walk, jaxpr),
        flops=sum(flops.values()),
        fraction_of_peak=peak / walk.cycles if walk.cycles else 0.0,
        busy={"compute": 0.0} | {k[1]: v for k, v in sums.items() if k[0] == "busy"},
        port_bytes=sums["port bytes"],
        sram_per_pe=memory.high_water(jaxpr, wafer),
        words={key[1]: value for key, value in sums.items() if key[0] == "words"},
        received=sums["received"],
        hops=sums["hops"],
        moves=round(sums["moves"]),
        host_bytes=of_host,
        by_operation=tuple(sorted(lines, key=lambda line: -line[-1])),
        unknown=walk.unknown,
        events=tuple(walk.events),
        accelerators=_rooflines(flops, of_host),
        tiles=tuple((key[1], value) for key, value in sums.items() if key[0] == "tiles"),
    )


def _extra(walk: Schedule, jaxpr: Any) -> float:
    """What the wafer's placement adds to the cycles of a walk."""
    if walk.wafer.placement is None:
        return 0.0
    side_by_side = dataclasses.replace(walk.wafer, placement=None)
    plain = Schedule(side_by_side, walk.constants, walk.clock_hz, walk.trips, walk.density)
    plain.run(jaxpr)
    return walk.cycles - plain.cycles


def _rooflines(flops: Mapping[str, float], moved: float) -> dict[str, float]:
    """Seconds of one chip at its peaks: every argument read once, every result written once."""
    return {
        chip.name: max(
            flops["float16"] / chip.bfloat16_flops
            + flops["float32"] / (chip.float32_flops or chip.bfloat16_flops),
            moved / chip.memory_bytes_per_second,
        )
        for chip in ACCELERATORS
    }


def _bytes(v: Any) -> float:
    if trace.is_literal(v) or not hasattr(v.aval, "shape"):
        return 0.0
    return size_of(v) * width_of(v.aval)
