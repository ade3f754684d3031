"""What a program costs on a wafer, read off its trace before anyone has a wafer: `wk.estimate`."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import Jaxpr

from wsekern.estimator import memory, trace
from wsekern.estimator.cost import DEFAULT, Constants, size_of, width_of
from wsekern.estimator.result import Estimate
from wsekern.estimator.schedule import Schedule
from wsekern.hardware import ACCELERATORS, check_clock
from wsekern.wafer.wafer import Wafer

_MOST_COUNT = 2**53  # to which each whole number is a float too


def estimate(
    function: Callable,
    *operands: Any,
    wafer: Wafer | None = None,
    clock_hz: float | None = None,
    trips: int | None = None,
    density: float = 1.0,
    launches: int = 1,
    constants: Constants = DEFAULT,
) -> Estimate:
    """The cost of `function(*operands)` on a wafer, read off its trace; nothing is computed.

    The function is traced once and its trace is walked as one PE runs it. A PE has a clock for its
    compute engine and one for its links in each direction, so that communication overlaps
    computation where the data allow it. A tile product of Mt x Kt and Kt x Nt is Mt Kt vector
    instructions of Nt elements, in loops. A move is charged its hops and its words on the busiest
    link; a reduction and a flood are priced as a whole. A loop is walked until its trips take
    equally long. Memory is the most that live tiles take at a time. On a wafer with defects, or a
    folded one, moves take the hops of its placement. Whole arrays outside `Wafer.map` are assumed
    to be tiled: a slice, a sum, a sort, a transpose or a gather moves what it reads of other tiles,
    and a product is priced as the cheapest program here would run it (`matmul`, `gemv`, a flood, a
    sum over slices), which the result names under `assumed`. An operation whose cost is not known
    counts as elementwise and evenly spread, and the result names it. Nine published measurements
    that no constant was fitted on are predicted with an error of 3.0 % on average and 7.1 % at most
    (docs/estimate.md).

    Args:
      function: any function that JAX can trace and whose kernels go through `Wafer.map`; a gradient
        or a whole training step as well.
      operands: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
      wafer: an abstract or virtual wafer; by default the one in force (`with wafer:`).
      clock_hz: cycles a second; by default the machine's.
      trips: how often to count a `lax.while_loop`, whose length the trace does not say.
      density: the share of a product's factors that are not zero, from 0 to 1. A PE multiplies a
        vector by one factor after another and skips the factors that are zero (S. Lie, Hot Chips
        33, 2021). Zeros are assumed to be in one operand and evenly spread.
      launches: the kernels that a GPU launches at least, such as one for each step of a stencil.
        `Estimate.accelerators` charges each, and data that exceed the chip's cache cross its memory
        in each. A trace cannot tell it: a loop of sends on a wafer may be one kernel on a GPU.
      constants: the fitted constants of the model.

    Raises:
      ValueError: there is no wafer; the wafer consists of devices, which have no cycles to count;
        a while loop has no `trips`, or they are less than 0; `density` is not from 0 to 1;
        `launches` is less than 1; `clock_hz` is not from 1 to 1e12; a count is not whole.
    """
    _check(clock_hz, trips, density, launches)
    jaxpr, wafer = trace.trace_program("estimate", function, operands, wafer)
    if wafer.machine is None:
        raise ValueError(
            f"estimate: {wafer!r} is of devices, which have no cycles to count; give "
            f"wafer=wk.Wafer.abstract(wk.WSE3, {wafer.height}, {wafer.width})"
        )
    clock_hz = wafer.machine.clock_hz if clock_hz is None else clock_hz
    walk = Schedule(wafer, constants, clock_hz, trips, density)
    walk.run(jaxpr)
    return _result(walk, jaxpr, launches)


def _result(walk: Schedule, jaxpr: Jaxpr, launches: int) -> Estimate:
    wafer, totals = walk.wafer, walk.clocks.totals
    flops = {dtype: totals.flops[dtype] * wafer.size for dtype in ("float32", "float16")}
    # The cycles that all PEs would need at their peaks, one dtype after the other.
    peak = sum(n / walk.machine.fmacs_per_cycle(d) / 2 / wafer.size for d, n in flops.items())
    lines = [(name, line, cycles) for (name, line), cycles in totals.cycles.items()]
    host_bytes = sum(_bytes(v) for v in (*jaxpr.invars, *jaxpr.outvars))
    return Estimate(
        wafer=wafer,
        clock_hz=walk.clock_hz,
        cycles=walk.cycles,
        extra_cycles=_extra_cycles(walk, jaxpr),
        flops=sum(flops.values()),
        fraction_of_peak=peak / walk.cycles if walk.cycles else 0.0,
        busy={"compute": 0.0} | dict(totals.busy),
        port_bytes=totals.port_bytes,
        sram_per_pe=memory.high_water(jaxpr, wafer, walk.stand_ins),
        words=dict(totals.words),
        received=totals.received,
        hops=totals.hops,
        moves=totals.moves,
        host_bytes=host_bytes,
        by_operation=tuple(sorted(lines, key=lambda line: -line[-1])),
        unknown=walk.unknown,
        assumed=walk.assumed,
        events=tuple(walk.clocks.timeline()),
        accelerators=_roofline_seconds(flops, host_bytes, launches),
        launches=launches,
        tiles=tuple(totals.tiles.items()),
    )


def _extra_cycles(walk: Schedule, jaxpr: Jaxpr) -> float:
    """The cycles that defects or folding add: those of the walk, less those of a plain wafer."""
    if walk.wafer.placement is None:
        return 0.0
    side_by_side = dataclasses.replace(walk.wafer, placement=None)
    plain = Schedule(side_by_side, walk.constants, walk.clock_hz, walk.trips, walk.density)
    plain.run(jaxpr)
    return walk.cycles - plain.cycles


def _roofline_seconds(
    flops: Mapping[str, float], host_bytes: float, launches: int
) -> dict[str, float]:
    """Seconds of one chip at its peaks, and to launch its kernels.

    Arguments are read and results written once, or in each launch if they exceed the cache.
    """
    seconds = {}
    for chip in ACCELERATORS:
        compute = flops["float16"] / chip.bfloat16_flops
        compute += flops["float32"] / (chip.float32_flops or chip.bfloat16_flops)
        memory = chip.memory_traffic(host_bytes, launches) / chip.memory_bytes_per_second
        seconds[chip.name] = max(compute, memory) + launches * chip.launch_seconds
    return seconds


def _bytes(v: Any) -> float:
    if trace.is_literal(v) or not hasattr(v.aval, "shape"):
        return 0.0
    return size_of(v) * width_of(v.aval)


def _check(clock_hz: float | None, trips: int | None, density: float, launches: int) -> None:
    if clock_hz is not None:
        check_clock("estimate: clock_hz", clock_hz)
    if not isinstance(density, numbers.Real) or not 0 <= density <= 1:  # NaN is not
        raise ValueError(f"estimate: density={density!r} must be from 0 to 1")
    for name, count, least in (("trips", trips, 0), ("launches", launches, 1)):
        if count is None and name == "trips":
            continue
        whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
        if not whole or not least <= count <= _MOST_COUNT:
            raise ValueError(
                f"estimate: {name}={count!r} must be {least} or more, a whole number, and at most "
                "2**53"
            )
