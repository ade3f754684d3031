"""Why an operation takes the algorithm it takes: one kind of answer, printed as a table."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One algorithm, and what it costs a PE."""

    words: float = 0.0  # of 32 bits, received
    steps: int = 0  # that wait for one another
    held_bytes: float = 0.0  # of other PEs' tiles, at a time
    cycles: float | None = None  # predicted, on a wafer; None on devices
    seconds: float | None = None  # predicted, on accelerators that are known; None elsewhere
    note: str = ""
    refused: str = ""  # why it cannot serve; "" where it can


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """The algorithm that one call takes, and every algorithm's cost; `print` it."""

    operation: str  # "matmul", "attention"
    algorithm: str  # "plain" where there is one PE
    why: str
    wafer: Wafer | None
    by_auto: bool = True  # or the caller named the algorithm
    candidates: Mapping[str, Candidate] = dataclasses.field(default_factory=dict)
    detail: str = ""  # one more line: what computes a PE's part, and why

    @property
    def _title(self) -> str:
        return f"{self.operation} on {self.wafer}: {self.algorithm}, {self.why}"

    @property
    def _columns(self) -> tuple[str, ...]:
        in_seconds = any(c.seconds is not None for c in self.candidates.values())
        return "algorithm", "words", "steps", "held KiB", "us" if in_seconds else "cycles", ""

    @property
    def _rows(self) -> list[tuple[str, ...]]:
        return [self._row(name, c) for name, c in self.candidates.items()]

    def _row(self, name: str, c: Candidate) -> tuple[str, ...]:
        if c.refused:
            return name, "", "", "", "", c.refused
        time = "" if c.cycles is None else f"{c.cycles:,.0f}"
        if c.seconds is not None:
            time = f"{c.seconds * 1e6:,.1f}"
        mark = "<- auto" if self.by_auto else "<- asked for"
        remark = ", ".join(r for r in (c.note, mark * (name == self.algorithm)) if r)
        held = f"{c.held_bytes / 1024:,.1f}"
        return name, f"{c.words:,.0f}", f"{c.steps:,}", held, time, remark

    def __str__(self) -> str:
        head = [self._title, *([self.detail] if self.detail else [])]
        if not self.candidates:
            return "\n".join(head)
        rows = [self._columns, *self._rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([*head, "", *lines])

    def _repr_html_(self) -> str:
        def row(cells: tuple[str, ...], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        title = f"<p>{html.escape(self._title)}</p>"
        title += f"<p>{html.escape(self.detail)}</p>" if self.detail else ""
        if not self.candidates:
            return title
        body = "".join(row(cells, "td") for cells in self._rows)
        return f"{title}<table>{row(self._columns, 'th')}{body}</table>"


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result", covariant=True)
Explain = TypeVar("Explain", bound=Callable[..., Explanation])
ExplainSeen = TypeVar("ExplainSeen", bound=Callable[..., Explanation], covariant=True)


@runtime_checkable
class Explained(Protocol[Arguments, Result, ExplainSeen]):
    """An operation that explains its choice of algorithm: `operation.explain(...)`."""

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result: ...

    @property
    def explain(self) -> ExplainSeen:
        """Which algorithm a call with the same arguments takes, and what each would cost."""


def explained_by(
    explain: Explain,
) -> Callable[[Callable[Arguments, Result]], Explained[Arguments, Result, Explain]]:
    """The decorator that gives a function its `explain`, visible to editors and type checkers.

    The function stays a plain function: `help` and `inspect.signature` see it as it was written.
    """

    def attach(
        function: Callable[Arguments, Result],
    ) -> Explained[Arguments, Result, Explain]:
        function.explain = explain  # type: ignore[attr-defined]
        return cast(Explained[Arguments, Result, Explain], function)

    return attach
