"""`Estimate`: what a program costs on a wafer, with its tables, maps and pages."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator.links import loads
from wsekern.estimator.schedule import Event
from wsekern.hardware import Machine
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
        from wsekern.estimator.pictures.wafer_map import wafer_map

        return wafer_map(self, path=path)

    def timeline(self, path: str | pathlib.Path) -> None:
        """Writes what one PE's engine and links did, for https://ui.perfetto.dev or chrome://tracing.

        Args:
          path: of the JSON file.
        """
        from wsekern.estimator.pictures.timeline import timeline

        timeline(self, path)

    def html(self, path: str | pathlib.Path, title: str | None = None) -> None:
        """Writes one page that tells and shows it all, and loads nothing else.

        Args:
          path: of the page.
          title: its heading; by default the wafer.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from wsekern.estimator.pictures.page import page

        page(self, path, title)

    def __str__(self) -> str:
        from wsekern.estimator.report import table

        return table(self)
