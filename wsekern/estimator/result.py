"""`wk.Estimate`: what a program costs on a wafer, with its tables, maps and pages."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator import report
from wsekern.estimator.clocks import Event
from wsekern.estimator.links import loads
from wsekern.hardware import Machine
from wsekern.wafer.axes import AXES
from wsekern.wafer.wafer import Wafer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The share of busy cycles in the run whose power was measured (M. Jacquelin et al., SC 2022).
_BUSY_AT_POWER = 0.696


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a program costs on a wafer, as `wk.estimate` returns it; `print` it for a table.

    Cycles are the answer, and a clock turns them into seconds. All PEs run the same program; where
    PEs differ, a figure is that of the PE or the link with the most. A notebook shows the table by
    itself.
    """

    wafer: Wafer
    clock_hz: float
    cycles: float  # until everything is done
    extra_cycles: float  # of `cycles`, those that defects or folding add
    flops: float  # of all PEs; a multiply-accumulate is two
    fraction_of_peak: float  # of all PEs' peak at the operands' dtypes, without sparsity
    busy: dict[str, float]  # cycles: of the engine ("compute"), of the busiest link by direction
    port_bytes: float  # that a PE reads from its memory and writes to it
    sram_per_pe: float  # bytes of data that a PE holds at most
    words: dict[str, float]  # 32-bit, on the busiest link by direction; "wafer": between wafers
    received: float  # 32-bit words that reach a PE
    hops: float  # hops that a PE's received words take, added up
    moves: int  # collectives
    host_bytes: float  # of the program's arguments and results
    # Operation, line, cycles; longest first. They add up to `cycles`.
    by_operation: tuple[tuple[str, str, float], ...]
    unknown: dict[str, str]  # operations whose cost is not known, with their source lines
    # What was chosen outside kernels, with first source lines: "dot_general as wk.matmul",
    # "reshape as a relayout".
    assumed: dict[str, str] = dataclasses.field(default_factory=dict)
    events: tuple[Event, ...]  # the timeline; of trips that were not walked, one event a lane
    accelerators: dict[str, float]  # seconds at the roofline of one chip, by its name
    launches: int = 1  # kernels of a GPU that `accelerators` charges
    tiles: tuple[tuple[loads.LinkPattern, float], ...] = ()  # words of a tile, by pattern of moves

    @property
    def machine(self) -> Machine:
        """The kind of wafer: its sizes, clock and power."""
        assert self.wafer.machine is not None
        return self.wafer.machine

    @property
    def seconds(self) -> float:
        """The time of `cycles` at `clock_hz`."""
        return self.cycles / self.clock_hz

    @property
    def flops_per_second(self) -> float:
        """The rate of all PEs together."""
        return self.flops / self.seconds if self.cycles else 0.0

    @property
    def energy(self) -> float | None:
        """Joules of all wafers, or None if the machine's power was not published.

        Where power at rest is known too, the power grows from there with the share of cycles in
        which the engine is busy.
        """
        power, idle = self.machine.power_watts, self.machine.idle_watts
        if power is None:
            return None
        if idle is not None and self.cycles:
            share = min(1.0, self.busy["compute"] / self.cycles / _BUSY_AT_POWER)
            power = idle + (power - idle) * share
        return power * self.seconds * self.wafer.wafers

    @property
    def host_seconds(self) -> float:
        """Seconds in which arguments and results pass the wafers' I/O; not part of `seconds`."""
        return self.host_bytes / (self.machine.io_bytes_per_second * self.wafer.wafers)

    @property
    def sram_free(self) -> float:
        """Bytes of a PE's memory that are left for data beside a kernel's code."""
        return self.machine.sram_bytes - self.machine.code_bytes

    @property
    def fits(self) -> bool:
        """Whether a PE has room for its data."""
        return self.sram_per_pe <= self.sram_free

    @property
    def memory_share(self) -> float:
        """The share of all cycles that the ports of a PE's memory take; part of the engine's."""
        ports = self.machine.read_bytes_per_cycle + self.machine.write_bytes_per_cycle
        return self.port_bytes / ports / self.cycles if self.cycles else 0.0

    @property
    def bound(self) -> str:
        """What takes the time: "compute", "memory", "fabric", or "latency" if none is half busy.

        It is "memory" where the engine is busiest and does nothing but wait for its memory's ports.
        """
        if not self.cycles:
            return "latency"
        # As reports show them, in percent: a lane that is shown as half busy is.
        shares = {lane: round(cycles / self.cycles, 2) for lane, cycles in self.busy.items()}
        engine = shares.pop("compute")
        links = max(shares.values(), default=0.0)
        if max(engine, links) < 0.5:
            return "latency"
        if links > engine:
            return "fabric"
        return "memory" if self.memory_share > 0.95 * engine else "compute"

    def link_words(self) -> dict[str, np.ndarray]:
        """The words that leave each PE by its link to the N, E, S and W, each `[height, width]`.

        Only these differ from PE to PE: compute and memory are the same on each, since all run the
        same program. On several wafers, each link has the figure of the wafer with the most.
        """
        sizes = {axis: self.wafer.axis_size(axis) for axis in AXES}
        return loads.total_loads(self.tiles, sizes)

    def plot(self, path: str | pathlib.Path | None = None) -> Figure:
        """A map of the wafer: the words on each PE's busiest link.

        A notebook shows the figure that this returns. `wk.wafer_map` draws other quantities.

        Args:
          path: where to write it, as .png, .svg or .pdf; None: nowhere.

        Raises:
          ImportError: matplotlib is not installed (`pip install -e '.[viz]' -c constraints.txt`).
          ValueError: the path ends in something else.
        """
        from wsekern.estimator.pictures.wafer_map import wafer_map

        return wafer_map(self, path=path)

    def timeline(self, path: str | pathlib.Path) -> None:
        """Writes what one PE's engine and links did, for https://ui.perfetto.dev or chrome://tracing.

        Args:
          path: of the JSON file.

        Raises:
          OSError: the path cannot be written.
        """
        from wsekern.estimator.pictures.timeline import timeline

        timeline(self, path)

    def html(self, path: str | pathlib.Path, title: str | None = None) -> None:
        """Writes one web page with all figures and pictures; the page loads nothing else.

        Args:
          path: of the page.
          title: its heading; by default the wafer.

        Raises:
          ImportError: matplotlib is not installed (`pip install -e '.[viz]' -c constraints.txt`).
          OSError: the path cannot be written.
        """
        from wsekern.estimator.pictures.page import page

        page(self, path, title)

    def __str__(self) -> str:
        return report.table(self)

    def _repr_html_(self) -> str:
        return report.html_table(report.rows(self))
