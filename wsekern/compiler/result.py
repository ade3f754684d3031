"""`Compilation`: what a chip's compiler made of a program, with its table and its page."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax

from wsekern.compiler import report
from wsekern.compiler.schedule import Cost
from wsekern.estimator.memory import LiveArray
from wsekern.hardware import Accelerator
from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one chip's memory that a program takes."""

    arguments: int = 0
    results: int = 0
    aliased: int = 0  # of the results, those that lie where an argument lay
    temporaries: int = 0
    code: int = 0
    refusal: str = ""  # the compiler's words, if it does not fit
    refused_bytes: float | None = None  # that it says were needed; None if it says no number

    @property
    def total(self) -> float:
        """All of it; of a program that does not fit what the compiler says."""
        if self.refusal:
            return self.refused_bytes or 0.0
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """A program as a chip's compiler made it, as `wk.compile` returns it; `print` it for a table.

    A notebook shows the table by itself.
    """

    name: str
    wafer: Wafer
    chip: Accelerator  # one device's figures
    trace_seconds: float  # JAX's part: tracing and lowering
    compile_seconds: float  # the compiler's part
    memory: MemoryUse
    argument_bytes: int  # of one chip, by the operands' layouts
    cost: Cost | None  # by the model; None where the schedule cannot be read
    why_no_schedule: str = ""
    roofline_seconds: float | None = None  # of all chips at their peaks; None: not known
    # Of a program that does not fit: what is live where its memory is fullest, by the compiler of
    # TPUs, or else by our own estimate.
    largest_arrays: tuple[LiveArray, ...] = ()
    arrays_estimated: bool = False
    executable: jax.stages.Compiled | None = dataclasses.field(default=None, repr=False)

    @property
    def fits(self) -> bool:
        """Whether the program fits the chip's memory; the compiler refuses one that does not."""
        return not self.memory.refusal

    @property
    def seconds(self) -> float | None:
        """The modelled time of one call; None where the schedule cannot be read."""
        return None if self.cost is None else self.cost.seconds

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip receives in all transfers of one call."""
        return 0.0 if self.cost is None else sum(s.bytes for s in self.cost.sent.values())

    @property
    def waited_bytes(self) -> float:
        """Of `sent_bytes`, those that the program waits for: no arithmetic hides them."""
        return 0.0 if self.cost is None else sum(s.waited_bytes for s in self.cost.sent.values())

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels of the vendor and of Pallas, with how often the program's text calls each."""
        return {} if self.cost is None else dict(self.cost.kernels)

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON takes them."""
        return report.as_json(self)

    def html(self, path: str | pathlib.Path, title: str | None = None) -> None:
        """Writes the report as one HTML page that loads nothing else.

        Raises:
          OSError: the path cannot be written.
        """
        from wsekern.compiler.page import write_page

        write_page(self, path, title)

    def __str__(self) -> str:
        return report.table(self)

    def _repr_html_(self) -> str:
        return report.notebook_table(self)
