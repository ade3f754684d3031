"""The figures of a bench as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from serving.commands.bench.figures import LevelFigures, Spread, Timing
from wsekern.estimator.pictures import figure, output, page
from wsekern.estimator.pictures.scaling import labeled_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHARES = ("median", "p90", "p99")
_TIMES = {
    "first token, ms": "first_token",
    "per token, ms": "per_token",
    "whole answer, ms": "latency",
    "lateness of sending, ms": "lateness",
}


def make_rows(levels: Sequence[LevelFigures]) -> list[tuple[str, ...]]:
    """The report: a figure's name, and its value at each level."""
    rows: list[tuple[str, ...]] = [
        ("concurrency", *(f"{level.concurrency:,}" for level in levels)),
        ("requests", *(f"{level.requests:,}" for level in levels)),
        ("failed", *(f"{sum(level.failures.values()):,}" for level in levels)),
        ("seconds", *(f"{level.seconds:,.1f}" for level in levels)),
    ]
    for name, field in _TIMES.items():
        spreads = [getattr(level, field) for level in levels]
        if field == "lateness" and not any(is_late(spread) for spread in spreads):
            continue
        for share in _SHARES:
            cells = ("-" if one is None else _milliseconds(getattr(one, share)) for one in spreads)
            rows.append((f"{name}: {share}", *cells))
    mean = [_mean(level.tokens, level) for level in levels]
    rows.append(("tokens of an answer, mean", *mean))
    rows.append(("tokens of a prompt, mean", *(_mean(x.prompt_tokens, x) for x in levels)))
    rows.append(("tokens/s, answers", *(f"{level.tokens_per_second:,.1f}" for level in levels)))
    read = (level.prompt_tokens_per_second for level in levels)
    rows.append(("tokens/s, prompts", *("-" if one is None else f"{one:,.1f}" for one in read)))
    return rows


def is_late(lateness: Spread | None) -> bool:
    """Whether requests were sent notably later than they were due."""
    return lateness is not None and lateness.p99 >= 0.001


def make_notes(levels: Sequence[LevelFigures], notes: Sequence[str] = ()) -> list[str]:
    """What a reader must know beside the table: failures by kind, and how tokens are counted.

    Args:
      levels: of the report.
      notes: said already of the server.
    """
    lines = list(notes)
    if not all(level.is_counted for level in levels):
        lines.append("the server counts no tokens: events with text are counted instead")
    for level in levels:
        for failure, count in level.failures.items():
            lines.append(f"concurrency {level.concurrency}: {count} failed: {failure}")
    return lines


def make_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """The report for a terminal."""
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(style="bold")
    for _ in rows[0][1:]:
        table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def write_json(
    path: pathlib.Path,
    head: Mapping[str, Any],
    levels: Sequence[tuple[LevelFigures, Sequence[Timing]]],
) -> None:
    """Writes all figures, and those of each request; times are in seconds.

    Args:
      path: of the file.
      head: what was measured, and how.
      levels: the figures of each, and its requests.

    Raises:
      OSError: it cannot be written.
    """
    written = [
        figures.as_dict() | {"timings": [dataclasses.asdict(one) for one in timings]}
        for figures, timings in levels
    ]
    output.write(path, json.dumps({**head, "levels": written}, indent=1) + "\n")


def write_plot(
    path: pathlib.Path, levels: Sequence[LevelFigures], title: str, notes: Sequence[str]
) -> None:
    """Draws the report to a picture, or with its table to a page.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    if path.suffix.lower() != ".html":
        with figure.style():
            picture = draw(levels)
        figure.save(picture, path)
        return
    rows = make_rows(levels)
    drawn: list[tuple[Callable[[], Figure], str]] = [
        (lambda: draw(levels), "Times are medians; the bands end at the 90th and 99th percentile.")
    ]
    parts = [page.render_pictures(drawn)]
    parts.append(page.render_table(("", *rows[0][1:]), rows[1:], range(1, len(rows[0]))))
    parts += [f"<p>{html.escape(note)}</p>" for note in notes]
    output.write(path, page.render_document(title, "python -m serving bench", parts))


def draw(levels: Sequence[LevelFigures]) -> Figure:
    """Throughput and times against concurrency, in the current matplotlib style."""
    made = figure.new_figure(7.2, 5.0)
    throughput, first, per_token, latency = made.subplots(2, 2).flat
    numbers = [level.concurrency for level in levels]
    throughput.plot(
        numbers, [x.tokens_per_second for x in levels], "o-", ms=3.5, color=figure.SERIES[0]
    )
    throughput.set_ylim(bottom=0)
    throughput.set_title("answers, tokens/s")
    times = {"first token, ms": first, "per token, ms": per_token, "whole answer, ms": latency}
    for index, (title, axes) in enumerate(times.items(), 1):
        known = [
            (level.concurrency, spread)
            for level in levels
            if (spread := getattr(level, _TIMES[title])) is not None
        ]
        _draw_times(axes, known, figure.SERIES[index])
        axes.set_title(title)
    for axes in made.axes:
        axes.set_xscale("log")
        shown = labeled_numbers(sorted({float(number) for number in numbers}))
        axes.set_xticks(shown, [f"{number:,.0f}" for number in shown])
        axes.minorticks_off()
        axes.grid(True)
        axes.set_xlabel("requests at once")
    return made


def _draw_times(axes: Axes, spreads: Sequence[tuple[int, Spread]], color: str) -> None:
    numbers = [number for number, _ in spreads]
    lines = {share: [1e3 * getattr(spread, share) for _, spread in spreads] for share in _SHARES}
    for upper, alpha in (("p99", 0.12), ("p90", 0.25)):
        axes.fill_between(numbers, lines["median"], lines[upper], color=color, alpha=alpha, lw=0)
        axes.plot(numbers, lines[upper], "_", color=color, alpha=0.7)
    axes.plot(numbers, lines["median"], "o-", ms=3.5, color=color)
    axes.set_ylim(bottom=0)


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _mean(total: int | None, level: LevelFigures) -> str:
    answered = level.requests - sum(level.failures.values())
    return "-" if total is None or not answered else f"{total / answered:,.1f}"
