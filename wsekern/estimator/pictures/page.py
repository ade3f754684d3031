"""An estimate as one HTML page that contains its pictures and loads nothing else."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator.pictures import figure, output, quantities, roofline, views, wafer_map
from wsekern.estimator.report import figures, of_wafer, with_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wsekern.estimator.result import Estimate

_MAP_INCHES = 4.2  # about a phone's width, so that the map is readable there
_OPEN_ROWS = 12  # rows of a table that are not folded away
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5c646d; --line: #d8dce0;
  --back: #ffffff; --panel: #f5f6f8; --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a2abb4; --line: #383e45;
  --back: #14171a; --panel: #1d2125; --mark: #6cb8ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 0.6rem; }
p { margin: 0.4rem 0; max-width: 46rem; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.6rem;
  margin: 1.2rem 0; }
.cards div { background: var(--panel); border-radius: 0.5rem; padding: 0.6rem 0.8rem; }
.cards b { display: block; font-size: 1.25rem; font-weight: 600; }
.cards span { color: var(--soft); font-size: 0.85rem; }
.bad b { color: #d55e00; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.2rem; margin: 1.2rem 0; align-items: start; }
figure { margin: 0; } figure svg { max-width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 0.88rem; max-width: 34rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; }
td { overflow-wrap: anywhere; } td:first-child { overflow-wrap: normal; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; color: var(--mark); padding: 0.5rem 0; }
@media (max-width: 30rem) { table { font-size: 0.8rem; } th, td { padding-right: 0.5rem; }
  th.n { white-space: normal; } }
"""


def page(e: Estimate, path: output.Path, title: str | None = None) -> None:
    """Writes the page: figures, pictures, cycles by operation and by line, and assumptions.

    Args:
      e: the estimate.
      path: of the page.
      title: its heading; by default the wafer.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the path cannot be written.
    """
    output.check_writable(path)
    figure.check_installed()
    output.write(path, render_page(e, title))


def render_page(e: Estimate, title: str | None = None) -> str:
    """The page as HTML text."""
    subtitle = (
        f"{of_wafer(e)}, {e.clock_hz / 1e9:.3g} GHz. Estimated by wsekern from the trace of the "
        "program; nothing was run."
    )
    parts = [
        _cards(e),
        "<h2>Pictures</h2>",
        _pictures(e),
        "<h2>Figures</h2>",
        render_table(("", ""), figures(e), numbers=()),
        "<h2>By operation</h2>",
        '<p class="soft">Each cycle of the program is one operation\'s; what runs beside a longer '
        "one takes none.</p>",
        _folding_table(("operation", "cycles", "share"), _shares(e, 0)),
        "<h2>By source line</h2>",
        _folding_table(("line", "cycles", "share"), _shares(e, 1)),
        "<h2>Each operation on its line</h2>",
        _folding_table(
            ("operation", "line", "cycles"), [(o, s, _count(n)) for o, s, n in e.by_operation]
        ),
        "<h2>Assumptions</h2>",
        render_table(("of", "what is assumed"), assumptions(e), numbers=()),
    ]
    return render_document(title or of_wafer(e), subtitle, parts)


def render_document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A page with a heading, a line of text below it, and `parts`, which are HTML."""
    heading = _escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{_STYLE}</style></head>\n<body>\n"
        f'<h1>{heading}</h1>\n<p class="soft">{_escape(subtitle)}</p>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def assumptions(e: Estimate) -> list[tuple[str, str]]:
    """What the figures and pictures of an estimate assume, as (subject, assumption) rows."""
    machine = e.machine
    rows = [
        ("PEs", "All run the same program: compute, memory and its traffic are the same on each; "
         "words are counted link by link."),
        ("clock", f"{e.clock_hz / 1e9:.3g} GHz, an input; cycles are the answer."),
        ("memory", f"{machine.sram_bytes:,} bytes of a PE, of which a kernel's code takes "
         f"{machine.code_bytes:,}."),
        ("links", f"{machine.link_bytes_per_cycle} bytes a cycle each way, "
         f"{machine.hop_cycles} cycle a hop, {machine.ramp_cycles} a ramp; routes go along x, "
         "then y."),
        ("floods", "Where the trace does not say where a flood starts, floods start on all PEs of "
         "their lines in turn, on the map."),
        ("changes of layout", "Even traffic between all pairs of PEs, half of it across the middle "
         "of the wafer."),
        ("whole arrays", "Outside kernels they are tiled, where that matters: what an operation "
         "reads of other tiles moves."),
        ("timeline", "A loop is walked until its trips take equally long; the others are shown as "
         "busy as the last one."),
        ("energy", "WSE-2: between the power measured at rest and in a stencil run, by how busy "
         "the PEs are. Others: the power of the system."),
        ("host", f"{with_unit(machine.io_bytes_per_second, 'B/s')} of each wafer; its latency is "
         "not counted, and its time is not part of the program's."),
        ("chips", "At their roofline: arguments read and results written once, or in each launch "
         "if they exceed the cache; half a microsecond to launch a kernel on a GPU."),
        ("not modeled", "Contention of different moves on one link, beyond that they take turns."),
    ]  # fmt: skip
    best = "outside kernels: the cheapest program that this library has for it"
    rows += [(f"{name} ({line or 'no line'})", best) for name, line in e.assumed.items()]
    spread = "without a figure, counted as elementwise and evenly spread"
    return rows + [(f"{name} ({line or 'no line'})", spread) for name, line in e.unknown.items()]


def _cards(e: Estimate) -> str:
    energy = "not known" if e.energy is None else with_unit(e.energy, "J")
    cards = [
        ("", f"{e.cycles:,.0f}", "cycles"),
        ("", with_unit(e.seconds, "s"), f"at {e.clock_hz / 1e9:.3g} GHz"),
        ("", e.bound if e.cycles else "nothing", "is what it is bound by"),
        ("", f"{e.fraction_of_peak:.1%}", f"of peak, {with_unit(e.flops_per_second, 'FLOP/s')}"),
        ("" if e.fits else "bad", f"{e.sram_per_pe / e.sram_free:,.{1 if e.fits else 0}%}",
         "of a PE's memory" + ("" if e.fits else ": does not fit")),
        ("", energy, "energy"),
    ]  # fmt: skip
    return render_cards(cards)


def render_cards(cards: Iterable[tuple[str, str, str]]) -> str:
    """The figures at the top of a page.

    Args:
      cards: for each, its class ("bad" or ""), the figure, and what it is.
    """
    # A long figure may break after a comma.
    made = (
        f'<div class="{kind}"><b>{_escape(value).replace(",", ",<wbr>")}</b>'
        f"<span>{_escape(label)}</span></div>"
        for kind, value, label in cards
    )
    return f'<div class="cards">{"".join(made)}</div>'


def _pictures(e: Estimate) -> str:
    load = quantities.on_wafer(e, quantities.quantity_of(e))
    no_defects = np.zeros(load.values.shape, bool)
    drawn = [
        (lambda: wafer_map.draw_map(load, no_defects, quantities.extent(e), _MAP_INCHES),
         "Words that leave each PE by its busiest link, north at the top."),
        (lambda: views.draw_directions(e), "The same by direction, in the same colors."),
        (lambda: views.draw_lanes(e), "How busy one PE's engine and its links are: a lane is as "
         "full as it is busy at that time. The file that Estimate.timeline writes has the names "
         "and the lines."),
        (lambda: roofline.draw_roofline(e), "The program is below its wafer's roof. On a chip it "
         "would at best reach the roof, less the time to launch its kernels."),
        (lambda: views.draw_longest(e), "Where the cycles go."),
    ]  # fmt: skip
    # No word on a link makes no map, no cycle no bars; what computes nothing is under no roof.
    shows = [load.values.any(), load.values.any(), e.cycles, e.flops and e.cycles, e.by_operation]
    if not any(shows):
        return "<p>There is nothing to draw: the program moves and computes nothing.</p>"
    return render_pictures(picture for picture, show in zip(drawn, shows, strict=True) if show)


def render_pictures(drawn: Iterable[tuple[Callable[[], Figure], str]]) -> str:
    """Pictures with their captions, as HTML.

    Args:
      drawn: for each, a function that draws it in the style of a page, and its caption.
    """
    made = []
    for draw, caption in drawn:
        with figure.style(of_page=True):
            picture = draw()
        svg = figure.inline_svg(picture, _escape(caption))
        made.append(f"<figure>{svg}<figcaption>{_escape(caption)}</figcaption></figure>")
    return f'<div class="pictures">{"".join(made)}</div>'


def _shares(e: Estimate, which: int) -> list[tuple[str, str, str]]:
    """Cycles by operation (`which` is 0) or by line (1), longest first, with their shares."""
    cycles: dict[str, float] = {}
    for name, line, each in e.by_operation:
        key = (name, line)[which]
        cycles[key] = cycles.get(key, 0.0) + each
    whole = sum(cycles.values()) or 1.0
    ordered = sorted(cycles.items(), key=lambda item: -item[1])
    return [(name or "no line", _count(n), f"{n / whole:.1%}") for name, n in ordered]


def _folding_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows after the first are folded away."""
    numbers = [i for i, name in enumerate(head) if name in ("cycles", "share")]
    first = render_table(head, rows[:_OPEN_ROWS], numbers)
    if len(rows) <= _OPEN_ROWS:
        return first
    more = render_table(head, rows[_OPEN_ROWS:], numbers)
    return f"{first}<details><summary>{len(rows) - _OPEN_ROWS:,} more</summary>{more}</details>"


def render_table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """A table as HTML.

    Args:
      head: a title for each column; all empty: no line of titles.
      rows: a cell for each column.
      numbers: the columns that are flush right.
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        kinds = ['class="n"' if i in numbers else "" for i in range(len(cells))]
        made = (
            f"<{tag} {k}>{_escape(c)}</{tag}>".replace(" >", ">")
            for k, c in zip(kinds, cells, strict=True)
        )
        return f"<tr>{''.join(made)}</tr>"

    top = f"<thead>{line('th', head)}</thead>" if any(head) else ""
    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _escape(value: str) -> str:
    return html.escape(value)
