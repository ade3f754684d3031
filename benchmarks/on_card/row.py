"""One row of the results of a run on a card."""

import dataclasses
from typing import Literal

# done; failed: beyond its tolerance; error: it raised; missing: a package is; cut off: while it ran
Status = Literal["done", "failed", "error", "missing", "no time", "cut off"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What one candidate did in one measurement, or why there is no result."""

    section: str = ""
    measurement: str  # such as "8192 x 8192 x 8192, bfloat16"
    candidate: str = ""  # whose result it is; in "correctness" the operation
    status: Status = "done"
    seconds: float | None = None  # of one call, median
    ratio: float | None = None  # its time over the peer's; None: of the peer itself, or unknown
    rate: float | None = None  # of the work that `unit` counts, a second
    unit: str = ""
    share: float | None = None  # of a ceiling: peak or bandwidth
    ceiling: str = ""  # which one: "the data sheet", "the measured peak", ...
    error: float | None = None  # |result - reference| / |reference|, norms
    tolerance: float | None = None
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    kernels: tuple[str, ...] = ()  # of the vendor or of Pallas, in the compiled program
    note: str = ""
    trace: str = ""  # of what was raised

    def line(self) -> str:
        """The row as one line of text."""
        named = ", ".join(part for part in (self.measurement, self.candidate) if part)
        return f"{self.section}: {named}: {', '.join(self.results())}"

    def results(self) -> list[str]:
        """What was found, in words."""
        if self.status not in ("done", "failed"):
            return [f"{self.status}: {self.note}" if self.note else self.status]
        found = []
        if self.error is not None:
            found.append(f"{self.status}, error {self.error:.1e} of {self.tolerance:.0e}")
        if self.seconds is not None:
            found.append(duration(self.seconds))
        if self.rate is not None:
            found.append(quantity(self.rate, self.unit))
        if self.ratio is not None:
            found.append(f"{self.ratio:.2f} of the peer's time")
        if self.share is not None:
            found.append(f"{self.share:.0%} of {self.ceiling}")
        return found + ([self.note] if self.note else [])


def duration(seconds: float) -> str:
    """Seconds as text, in a unit that suits them."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def quantity(value: float, unit: str) -> str:
    """A rate as text, with the prefix of its unit: "790 TFLOP/s", "12,300 tokens/s"."""
    if unit in ("FLOP/s", "B/s", "cells/s"):
        for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
            if value >= size:
                return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
