"""A compilation as one HTML page that contains its pictures and loads nothing else."""

from __future__ import annotations

import html
import pathlib
from typing import TYPE_CHECKING

from wsekern.compiler import report
from wsekern.estimator.pictures import output
from wsekern.estimator.pictures.page import render_cards, render_document, render_table

if TYPE_CHECKING:
    from wsekern.compiler.result import Compilation

# Colors that stay apart for most readers, in light and in dark.
_PARTS = {"arguments": "#0072b2", "results": "#56b4e9", "temporaries": "#e69f00", "code": "#8a8f98"}
_TIMES = {"XLA's code": "#0072b2", "kernels": "#009e73", "waiting": "#d55e00"}
_STYLE = """<style>
.bar { display: flex; height: 1.5rem; border-radius: 0.3rem; overflow: hidden;
  background: var(--panel); margin: 0.3rem 0; }
.bar div { min-width: 0; }
.key { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; font-size: 0.88rem;
  color: var(--soft); margin-bottom: 1rem; }
.key i { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 0.15rem;
  margin-right: 0.35rem; vertical-align: -0.1rem; }
.left div.wide td:first-child { white-space: nowrap; }
</style>"""


def write_page(c: Compilation, path: str | pathlib.Path, title: str | None = None) -> None:
    """Writes the page: memory, time in its three parts, transfers, longest operations.

    Args:
      c: the compilation.
      path: of the page.
      title: its heading; by default the program's name.

    Raises:
      OSError: the path cannot be written.
    """
    output.check_writable(path)
    output.write(path, render_page(c, title))


def render_page(c: Compilation, title: str | None = None) -> str:
    """The page as HTML text."""
    subtitle = (
        f"Compiled for {c.chip.name} by its own compiler in {c.compile_seconds:.1f} s; nothing was "
        "run, and times are of a model."
    )
    parts = [_STYLE, _cards(c), "<h2>Memory of a chip</h2>", _memory(c)]
    if c.cost is not None:
        parts += ["<h2>Time</h2>", _time(c)]
    parts += ["<h2>Figures</h2>", render_table(("", ""), report.figures(c), numbers=())]
    if c.cost is not None:
        head = ("collective", "along", "times", "bytes", "waited for", "waiting")
        rows = report.sent_rows(c)
        sends = render_table(head, rows, (2, 3, 4, 5)) if rows else "<p>Nothing is sent.</p>"
        parts += ["<h2>What it sends</h2>", sends]
        longest = [(name, line, time) for time, name, line in report.longest_rows(c)]
        parts += ["<h2>Longest operations</h2>"]
        parts += [render_table(("operation", "line", "time"), longest, (2,))]
    left = render_table(("", ""), report.left_out(c), numbers=())
    parts += ["<h2>What the figures leave out</h2>", f'<div class="left">{left}</div>']
    return render_document(title or c.name, subtitle, parts)


def _cards(c: Compilation) -> str:
    limit = report.size(c.chip.memory_bytes)
    if c.fits:
        cards = [("", f"{c.memory.total / c.chip.memory_bytes:.1%}", f"of a chip's {limit}")]
    else:
        needed = report.size(c.memory.total) if c.memory.total else "more"
        cards = [("bad", needed, f"needed; a chip has {limit}")]
    if c.cost is not None:
        cards.append(("", report.seconds(c.cost.seconds), "modelled time"))
        if c.sent_bytes:
            hidden = 1 - c.waited_bytes / c.sent_bytes
            cards.append(("", f"{hidden:.0%}", f"of {report.size(c.sent_bytes)} sent are hidden"))
        else:
            cards.append(("", "0", "bytes are sent"))
        cards.append(("", f"{sum(c.kernels.values())}", "calls of the vendor's or Pallas' kernels"))
        if c.roofline_seconds and c.cost.seconds:
            cards.append(
                ("", f"{c.roofline_seconds / c.cost.seconds:.0%}", "of the roofline reached")
            )
    wafers, height, width = c.wafer.grid
    grid = f"{height}x{width}" if wafers == 1 else f"{wafers}x{height}x{width}"
    cards.append(("", grid, c.chip.name))
    return render_cards(cards)


def _memory(c: Compilation) -> str:
    if not c.fits:
        arrays = render_table(report.array_head(c), report.array_rows(c), (0,))
        return f"<p>{html.escape(c.memory.refusal)}</p>{arrays}"
    m = c.memory
    parts = dict(zip(_PARTS, (m.arguments, m.results - m.aliased, m.temporaries, m.code),
                     strict=True))  # fmt: skip
    return _bar(
        {name: (value, report.size(value)) for name, value in parts.items()},
        _PARTS,
        max(c.chip.memory_bytes, m.total),
        f"free of {report.size(c.chip.memory_bytes)}",
    )


def _time(c: Compilation) -> str:
    cost = c.cost
    assert cost is not None
    values = (cost.fusion_seconds, cost.kernel_seconds, cost.waited_seconds)
    parts = {n: (v, report.seconds(v)) for n, v in zip(_TIMES, values, strict=True)}
    return _bar(parts, _TIMES, cost.seconds, "")


def _bar(
    parts: dict[str, tuple[float, str]], colors: dict[str, str], whole: float, rest: str
) -> str:
    """A bar of parts of `whole`, with a key; what they leave free is called `rest`."""
    pieces = "".join(
        f'<div style="width:{100 * value / (whole or 1):.3f}%;background:{colors[name]}" '
        f'title="{html.escape(name)} {html.escape(text)}"></div>'
        for name, (value, text) in parts.items()
    )
    key = "".join(
        f'<span><i style="background:{colors[name]}"></i>{html.escape(name)} {html.escape(text)}'
        "</span>"
        for name, (_, text) in parts.items()
    )
    empty = f"<span>{html.escape(rest)}</span>" if rest else ""
    return f'<div class="bar">{pieces}</div><div class="key">{key}{empty}</div>'
