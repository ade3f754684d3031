"""This file is an estimate as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wsekern.estimator.estimate import Estimate

_LINES = 12  # of the schedule


def table(e: Estimate) -> str:
    """The figures of an estimate, and the operations that take longest."""
    grid = f"{e.wafer.height}x{e.wafer.width}" + (
        f" PEs, {e.wafer.wafers} wafers" if e.wafer.wafers > 1 else " PEs"
    )
    sram = f"{e.sram_per_pe:,.0f} bytes of {e.sram_free:,.0f}"
    if not e.fits:
        sram += f": {e.sram_per_pe - e.sram_free:,.0f} too many; use more PEs or smaller tiles"
    energy = "not known" if e.energy is None else _with_unit(e.energy, "J")
    busy = ", ".join(
        f"{lane} {cycles / e.cycles:.0%}" for lane, cycles in e.busy.items() if e.cycles
    )
    words = ", ".join(f"{lane} {n:,.0f}" for lane, n in e.words.items()) or "none"
    rows = [
        ("machine", f"{e.machine.name}, {grid}, {e.clock_hz / 1e9:.3g} GHz"),
        ("cycles", f"{e.cycles:,.0f}"),
        ("time", _with_unit(e.seconds, "s")),
        ("energy", energy),
        ("work", f"{_with_unit(e.flops_per_second, 'FLOP/s')}, {e.fraction_of_peak:.1%} of peak"),
        ("bound by", f"{e.bound} (busy: {busy})"),
        ("memory of a PE", sram),
        ("words on a link", words),
        ("words to a PE", f"{e.received:,.0f} in {e.moves:,} moves, {e.hops:,.0f} hops"),
        ("host I/O", f"{_with_unit(e.host_bytes, 'B')}, {_with_unit(e.host_seconds, 's')}"),
    ]
    rows += [(name, f"{_with_unit(s, 's')} at its roofline")
             for name, s in e.accelerators.items()]  # fmt: skip
    if e.unknown:
        told = ", ".join(f"{name} ({line or 'no line'})" for name, line in e.unknown.items())
        rows.append(("spread evenly", told))
    lines = [f"{name:<16} {value}" for name, value in rows]
    longest = e.by_operation[:_LINES]
    if longest:
        lines += ["", f"{'cycles':>16}  operation"]
        lines += [f"{cycles:>16,.0f}  {name}  {line}" for name, line, cycles in longest]
    return "\n".join(lines)


def _with_unit(value: float, unit: str) -> str:
    scales = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"))
    for scale, prefix in (*scales, (1e-6, "u")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value / 1e-9:.3g} n{unit}"
