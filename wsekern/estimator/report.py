"""An estimate as text, and as a table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TYPE_CHECKING

from wsekern.hardware import ACCELERATORS

if TYPE_CHECKING:
    from wsekern.estimator.result import Estimate

_LONGEST = 12  # operations that the table of an estimate names
_PREFIXES = {
    1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1: "", 1e-3: "m", 1e-6: "u", 1e-9: "n",
    1e-12: "p",
}  # fmt: skip


def table(e: Estimate) -> str:
    """The figures of an estimate, and the operations that take longest."""
    lines = [f"{name:<16} {value}" for name, value in figures(e)]
    longest = _longest(e)
    if longest:
        lines += ["", f"{'cycles':>16}  operation"]
        lines += [f"{cycles:>16,.0f}  {name}  {line}" for name, line, cycles in longest]
    return "\n".join(lines)


def rows(e: Estimate) -> list[tuple[str, str]]:
    """The lines of `table`, each as two cells."""
    operations = [
        (f"{cycles:,.0f} cycles", f"{name}  {line}") for name, line, cycles in _longest(e)
    ]
    return figures(e) + operations


def _longest(e: Estimate) -> list[tuple[str, str, float]]:
    """The operations that take most cycles; not those that run beside others and take none."""
    return [row for row in e.by_operation[:_LONGEST] if row[-1] >= 0.5]


def html_table(cells: Iterable[tuple[str, str]]) -> str:
    """An HTML table with a name and a value in each row, as a notebook shows it."""
    # Notebooks align cells to the right unless a cell says otherwise.
    left = 'style="text-align: left"'
    body = "".join(
        f"<tr><th {left}>{html.escape(name)}</th><td {left}>{html.escape(value)}</td></tr>"
        for name, value in cells
    )
    return f"<table><tbody>{body}</tbody></table>"


def _placement(e: Estimate) -> str:
    placement = e.wafer.placement
    assert placement is not None
    height, width = placement.physical
    y, x = placement.longest["y"], placement.longest["x"]
    share = e.extra_cycles / e.cycles if e.cycles else 0.0
    return (
        f"{placement.faulty:,} of {height}x{width} PEs faulty; neighbors up to {y} hops apart "
        f"along y, {x} along x: {e.extra_cycles:+,.0f} cycles ({share:+.1%} of them)"
    )


def of_wafer(e: Estimate) -> str:
    """The machine and the grid: "WSE-3, 755x1170 PEs"."""
    wafers = f", {e.wafer.wafers} wafers" if e.wafer.wafers > 1 else ""
    return f"{e.machine.name}, {e.wafer.height}x{e.wafer.width} PEs{wafers}"


def figures(e: Estimate) -> list[tuple[str, str]]:
    """The figures of an estimate with their names, in the order of the table."""
    sram = f"{e.sram_per_pe:,.0f} bytes of {e.sram_free:,.0f}"
    if not e.fits:
        sram += f": {e.sram_per_pe - e.sram_free:,.0f} too many; use more PEs or smaller tiles"
    energy = "not known" if e.energy is None else with_unit(e.energy, "J")
    busy = ", ".join(f"{lane} {share:.0%}" for lane, share in busy_shares(e).items())
    if busy and e.bound == "memory":
        busy += "; compute waits for memory"
    words = ", ".join(f"{lane} {n:,.0f}" for lane, n in e.words.items()) or "none"
    rows = [
        ("machine", f"{of_wafer(e)}, {e.clock_hz / 1e9:.3g} GHz"),
        ("cycles", f"{e.cycles:,.0f}"),
        ("time", with_unit(e.seconds, "s")),
        ("energy", energy),
        ("work", f"{with_unit(e.flops_per_second, 'FLOP/s')}, {e.fraction_of_peak:.1%} of peak"),
        ("bound by", f"{e.bound} (busy: {busy})" if busy else "nothing: it takes no cycles"),
        ("memory of a PE", sram),
        ("words on a link", words),
        ("words to a PE", f"{e.received:,.0f} in {e.moves:,} moves, {e.hops:,.0f} hops"),
        ("host I/O", f"{with_unit(e.host_bytes, 'B')}, {with_unit(e.host_seconds, 's')}"),
    ]
    # A chip whose loops run on it launches nothing more.
    launching = (
        {chip.name for chip in ACCELERATORS if chip.launch_seconds} if e.launches > 1 else ()
    )
    rows += [
        (name, f"{with_unit(s, 's')} at its roofline"
         + (f", {e.launches:,} launches" if name in launching else ""))
        for name, s in e.accelerators.items()
    ]  # fmt: skip
    if e.wafer.placement is not None:
        rows.insert(2, ("placement", _placement(e)))
    for title, lines in (("assumed", e.assumed), ("spread evenly", e.unknown)):
        if lines:
            names = ", ".join(f"{name} ({line or 'no line'})" for name, line in lines.items())
            rows.append((title, names))
    return rows


def busy_shares(e: Estimate) -> dict[str, float]:
    """The share of all cycles in which the engine, its memory's ports and each link are busy."""
    if not e.cycles:
        return {}
    shares = {lane: cycles / e.cycles for lane, cycles in e.busy.items()}
    return {"compute": shares.pop("compute"), "memory": e.memory_share} | shares


def with_unit(value: float, unit: str) -> str:
    """`value` with three digits and a prefix: "1.52 PFLOP/s"."""
    if not value:
        return f"0 {unit}"
    value = float(f"{value:.3g}")  # 999.9 is 1.00 k
    if unit == "s" and abs(value) >= 1e3:  # nobody counts in kiloseconds
        return f"{value:,.0f} s"
    scale = next((scale for scale in _PREFIXES if abs(value) >= scale), min(_PREFIXES))
    return f"{value / scale:.3g} {_PREFIXES[scale]}{unit}"
