"""This file is what a program costs on a wafer, before anyone has one: `wk.estimate`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from wsekern.estimator import loads, memory, trace
from wsekern.estimator.cost import DEFAULT, Constants, size_of, width_of
from wsekern.estimator.schedule import Event, Schedule
from wsekern.hardware import ACCELERATORS, Machine
from wsekern.wafer.axes import AXES
from wsekern.wafer.wafer import Wafer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Jacquelin et al., SC 2022, whose average power this is measured at: the share of busy cycles.
_BUSY_AT_POWER = 0.696


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a program costs on a wafer; `print` it for a table.

    Cycles are the answer, and a clock turns them into seconds. Figures of a PE are those of one
    that does most.
    """

    wafer: Wafer
    clock_hz: float
    cycles: float
    extra_cycles: float  # of these, what PEs cost that do not lie side by side: defects, folding
    flops: float  # of all PEs; a multiply-accumulate is two
    fraction_of_peak: float  # of what the PEs can do at the operands' dtypes, without sparsity
    busy: dict[str, float]  # cycles, of the compute engine and of the busiest link each way
    port_bytes: float  # that a PE reads from its memory and writes there
    sram_per_pe: float  # bytes of data that a PE holds at most
    words: dict[str, float]  # on the busiest link of each direction; "wafer" is between wafers
    received: float  # words that reach a PE
    hops: float  # that these take, all together
    moves: int  # collectives
    host_bytes: float  # of the program's arguments and results
    by_operation: tuple[tuple[str, str, float], ...]  # operation, line, cycles; longest first
    unknown: dict[str, str]  # operations without a figure, and where they stand
    events: tuple[Event, ...]  # the timeline, of the trips of a loop that were walked
    accelerators: dict[str, float]  # seconds at the roofline of one chip, by its name
    tiles: tuple[
        tuple[loads.Pattern, float], ...
    ] = ()  # words of a tile that moved by each pattern

    @property
    def machine(self) -> Machine:
        """What the wafer is made of."""
        assert self.wafer.machine is not None
        return self.wafer.machine

    @property
    def seconds(self) -> float:
        """At `clock_hz`."""
        return self.cycles / self.clock_hz

    @property
    def flops_per_second(self) -> float:
        """Of all PEs."""
        return self.flops / self.seconds if self.cycles else 0.0

    @property
    def energy(self) -> float | None:
        """Joules, at rest and more as the PEs are busy; None where no power was published."""
        power, idle = self.machine.power_watts, self.machine.idle_watts
        if power is None:
            return None
        if idle is not None and self.cycles:
            share = min(1.0, self.busy["compute"] / self.cycles / _BUSY_AT_POWER)
            power = idle + (power - idle) * share
        return power * self.seconds * self.wafer.wafers

    @property
    def host_seconds(self) -> float:
        """Until arguments and results have gone through the wafers' I/O, where nothing is kept."""
        return self.host_bytes / (self.machine.io_bytes_per_second * self.wafer.wafers)

    @property
    def sram_free(self) -> float:
        """Bytes that data may take of a PE: its memory without a kernel's code."""
        return self.machine.sram_bytes - self.machine.code_bytes

    @property
    def fits(self) -> bool:
        """Whether a PE has room for its data."""
        return self.sram_per_pe <= self.sram_free

    @property
    def bound(self) -> str:
        """What the time is made of: "compute", "memory", "fabric", or "latency" where none is."""
        if not self.cycles:
            return "latency"
        ports = self.machine.read_bytes_per_cycle + self.machine.write_bytes_per_cycle
        shares = {
            "memory": self.port_bytes / ports / self.cycles,
            "compute": self.busy["compute"] / self.cycles,
            "fabric": max((v for k, v in self.busy.items() if k != "compute"), default=0.0)
            / self.cycles,
        }
        most = max(shares, key=lambda name: shares[name])
        return most if shares[most] >= 0.5 else "latency"

    def link_words(self) -> dict[str, np.ndarray]:
        """The words that leave each PE by its link to the N, E, S and W, each `[height, width]`.

        What differs from PE to PE; all else is the same on each, since all run one program. On
        several wafers, of the one whose links carry most.
        """
        sizes = {axis: self.wafer.axis_size(axis) for axis in AXES}
        return loads.total(self.tiles, sizes)

    def plot(self, path: str | pathlib.Path | None = None) -> Figure:
        """A map of the wafer: the words on each PE's busiest link (`wk.wafer_map` draws others).

        Args:
          path: where to write it, as PNG, SVG or PDF; None: nowhere.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from wsekern.pictures.wafer_map import wafer_map

        return wafer_map(self, path=path)

    def timeline(self, path: str | pathlib.Path) -> None:
        """Writes what one PE's engine and links did, for https://ui.perfetto.dev or chrome://tracing.

        Args:
          path: of the JSON file.
        """
        from wsekern.pictures.timeline import timeline

        timeline(self, path)

    def html(self, path: str | pathlib.Path, title: str | None = None) -> None:
        """Writes one page that tells and shows it all, and loads nothing else.

        Args:
          path: of the page.
          title: its heading; by default the wafer.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from wsekern.pictures.page import page

        page(self, path, title)

    def __str__(self) -> str:
        from wsekern.estimator.report import table

        return table(self)


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
