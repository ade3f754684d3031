"""One run on a card: the clock that every measurement asks, and the rows that it leaves.

The file of results is written again after every row, so that it holds what was measured however
the run ends.
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.on_card.row import Row
from benchmarks.on_card.table import show, write_markdown
from wsekern.atomic_write import atomic_write, remove_partial_files
from wsekern.interrupts import INTERRUPTED, do_nothing, watch_signals

SHEET, PEAK, BANDWIDTH = "the data sheet", "the measured peak", "the measured bandwidth"
TERMINATED = 128 + signal.SIGTERM  # exit status
Measurement = Callable[[], Iterable[Row]]
_LOCK_SECONDS = 5.0  # a thread that ends the process waits so long for a file that is being written
_SMALL_COST = 0.1  # what a measurement of tiny sizes takes, over one of the sizes for a card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Rates of one card; None: not known."""

    sheet_flops: float | None = None  # bfloat16, FLOP/s, by `wsekern.hardware`
    sheet_bytes_per_second: float | None = None
    flops: float | None = None  # bfloat16, FLOP/s, of the largest product
    bytes_per_second: float | None = None  # read and written by a large copy

    @property
    def rated(self) -> tuple[float | None, str]:
        """The data sheet's peak, or the measured one where the card is not listed; and its name."""
        return (self.sheet_flops, SHEET) if self.sheet_flops else self.peak

    @property
    def peak(self) -> tuple[float | None, str]:
        """The measured peak, and its name."""
        return self.flops, PEAK

    @property
    def bandwidth(self) -> tuple[float | None, str]:
        """The measured bandwidth, and its name."""
        return self.bytes_per_second, BANDWIDTH


class Session:
    """Runs measurements while there is time, and keeps their rows."""

    def __init__(
        self,
        folder: pathlib.Path,
        minutes: float,
        *,
        small: bool = False,
        begun: float | None = None,
    ) -> None:
        """A session with no row.

        Args:
          folder: where `card.json` and `card.md` go.
          minutes: how long the whole run may take.
          small: whether sizes are tiny, to try the program itself.
          begun: when it began, by `time.monotonic`; by default now.
        """
        self.folder, self.minutes, self.small = folder, minutes, small
        self.begun = time.monotonic() if begun is None else begun
        self.rows: list[Row] = []
        self.ceilings = Ceilings()
        self.environment: Mapping[str, Any] = {}
        self.section, self.not_begun = "", list[str]()
        self._section_ends = self.begun + 60 * minutes
        self._running: list[str] = []  # measurements
        self._estimated = self._took = 0.0  # seconds of all measurements so far
        self._lock = threading.RLock()

    def left(self) -> float:
        """Seconds until the section has to end."""
        return self._section_ends - time.monotonic()

    def expect(self, cost: float) -> float:
        """Seconds that a measurement is expected to take here, given its cost on an H200.

        Where earlier ones took longer than their costs, this one will too. That some took less says
        little about the next, whose program may be slow to compile.
        """
        pace = max(1.0, self._took / self._estimated) if self._estimated else 1.0
        return cost * pace * (_SMALL_COST if self.small else 1.0)

    def has_raced(self) -> bool:
        """Whether the section has a row already."""
        return any(row.section == self.section for row in self.rows)

    def begin(self, section: str, share: float) -> None:
        """Begins a section, which may take until `share` of the whole time is over."""
        with self._lock:
            self.section = section
            self._section_ends = self.begun + 60 * self.minutes * share
            if section in self.not_begun:
                self.not_begun.remove(section)

    def measure(self, measurement: str, cost: float, run: Measurement) -> None:
        """Adds the rows of `run()`, or one that says why there are none.

        Args:
          measurement: its name, for that row.
          cost: the seconds that it takes on an H200, compiling included, roughly.
          run: gives the rows, the first as soon as it is known.
        """
        expected = self.expect(cost)
        if expected > self.left():
            note = f"needs about {expected:.0f} s, {max(0.0, self.left()):.0f} s were left"
            self.add(Row(measurement=measurement, status="no time", note=note))
            return
        begun = time.monotonic()
        self._running.append(measurement)
        try:
            for row in run():
                self.add(row)
        except Exception as error:  # whatever a kernel raises, the others are measured
            self.add(failure(measurement, error))
        else:
            with self._lock:
                self._estimated += expected
                self._took += time.monotonic() - begun
        finally:
            self._running.remove(measurement)
            gc.collect()  # arrays of this measurement leave the card's memory

    def measure_together(
        self, measurements: Iterable[tuple[str, Measurement]], cost: float, threads: int
    ) -> None:
        """Measures several at once, each as `measure` does; not for what is timed.

        Args:
          measurements: name -> gives its rows.
          cost: of one.
          threads: how many at once.
        """
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for name, run in measurements:
                pool.submit(self.measure, name, cost, run)

    def add(self, row: Row) -> None:
        """Keeps a row, prints it on one line and writes the file of results."""
        row = dataclasses.replace(row, section=row.section or self.section)
        with self._lock:
            self.rows.append(row)
            print(row.line(), flush=True)
            self.write("the run has not ended")

    def finish(self, ended: str = "all was tried") -> None:
        """Writes the file and the table, and prints the table."""
        with self._lock:
            for section in self.not_begun:
                self.rows.append(Row(section=section, measurement="everything", status="no time"))
            self.not_begun = []
            self.write(ended)
            write_markdown(self.folder / "card.md", self.rows, self._heading(ended))
            show(self.rows, self._heading(ended))

    def write(self, ended: str) -> None:
        """Writes the file of results.

        Args:
          ended: how the run ended, or that it has not.

        Raises:
          OSError: the file cannot be written.
        """
        content = {
            "environment": self.environment,
            "minutes": self.minutes,
            "small": self.small,
            "ended": ended,
            "took_seconds": round(time.monotonic() - self.begun, 1),
            "ceilings": dataclasses.asdict(self.ceilings),
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }
        with atomic_write(self.folder / "card.json") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())

    @contextlib.contextmanager
    def ending_in_time(self) -> Iterator[None]:
        """Ends the process when the time is over, at Ctrl-C or at SIGTERM, with what there is.

        A thread does, since the main one may be in XLA's compiler for a minute.
        """
        whole = self.begun + 60 * self.minutes - time.monotonic()
        late = threading.Timer(max(0.0, whole), self._end, ("the time was over", 0))
        late.daemon = True
        late.start()
        undo = self._answer_signals()
        try:
            yield
        finally:
            late.cancel()
            undo()

    def _answer_signals(self) -> Callable[[], None]:
        if threading.current_thread() is not threading.main_thread():
            return lambda: None
        numbers = signal.SIGINT, signal.SIGTERM
        before = [signal.signal(number, do_nothing) for number in numbers]

        def answer(number: int) -> None:
            if number in numbers:
                status = INTERRUPTED if number == signal.SIGINT else TERMINATED
                self._end(f"{signal.Signals(number).name} came", status)

        stop = watch_signals(answer)

        def undo() -> None:
            stop()
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

        return undo

    def _end(self, reason: str, status: int) -> None:
        self._lock.acquire(timeout=_LOCK_SECONDS)
        for name in self._running:
            row = Row(section=self.section, measurement=name, status="cut off", note=reason)
            self.rows.append(row)
        with contextlib.suppress(OSError):
            self.finish(reason)
        remove_partial_files()
        os._exit(status)

    def _heading(self, ended: str) -> str:
        where = ", ".join(f"{name} {value}" for name, value in self.environment.items())
        took = (time.monotonic() - self.begun) / 60
        sizes = "tiny sizes, " if self.small else ""
        return f"{where}; {sizes}{took:.1f} of {self.minutes:g} minutes, {ended}"


def failure(measurement: str, error: Exception, candidate: str = "") -> Row:
    """The row of a measurement that raised `error`."""
    row = Row(measurement=measurement, candidate=candidate, status="error")
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return dataclasses.replace(row, status="missing", note=f"{package} not installed")
    lines = str(error).strip().splitlines()
    trace = "".join(traceback.format_exception(error))
    note = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return dataclasses.replace(row, note=note, trace=trace)
