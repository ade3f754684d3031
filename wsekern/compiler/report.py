"""A compilation as text, as JSON, and as a table in a notebook."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING, Any

from wsekern.estimator.report import html_table, with_unit
from wsekern.hardware import GIB, KIB, MIB

if TYPE_CHECKING:
    from wsekern.compiler.result import Compilation

_LONGEST = 12  # operations that a table names


def table(c: Compilation) -> str:
    """The figures, what is sent, the kernels, the longest operations, and what is left out."""
    lines = [f"{name:<16} {value}" for name, value in figures(c)]
    if arrays := array_rows(c):
        lines += ["", *columns([array_head(c), *arrays], flush_right=(0,))]
    if transfers := sent_rows(c):
        head = ("collective", "along", "times", "bytes", "waited for", "")
        lines += ["", *columns([head, *transfers])]
    if longest := longest_rows(c):
        lines += ["", *columns([("time", "operation", "line"), *longest], flush_right=(0,))]
    lines += ["", *(f"{name:<16} {text}" for name, text in left_out(c))]
    return "\n".join(lines)


def notebook_table(c: Compilation) -> str:
    """The figures as HTML."""
    return html_table(figures(c))


def figures(c: Compilation) -> list[tuple[str, str]]:
    """The figures with their names, in the order of the table."""
    rows = [("program", c.name), ("chips", _chips(c)), ("memory of a chip", _memory(c))]
    if c.fits:
        m = c.memory
        parts = [("arguments", m.arguments), ("temporaries", m.temporaries), ("code", m.code)]
        new = m.results - m.aliased
        parts.insert(1, ("results", new))
        reused = f" ({size(m.aliased)} more lie where arguments lay)" if m.aliased else ""
        rows.append(("of which", ", ".join(f"{name} {size(n)}" for name, n in parts) + reused))
    else:
        rows.append(("arguments", f"{size(c.argument_bytes)}, by their layouts"))
        rows.append(("compiler", c.memory.refusal))
    if c.cost is None:
        rows.append(("schedule", c.why_no_schedule))
    else:
        rows += _time_rows(c)
    rows.append(("compiled in", f"{c.compile_seconds:.1f} s, traced in {c.trace_seconds:.1f} s"))
    return rows


def _time_rows(c: Compilation) -> list[tuple[str, str]]:
    cost = c.cost
    assert cost is not None
    counted = f" ({cost.cycles:,.0f} cycles)" if cost.cycles else ""
    rows = [
        ("modelled time", seconds(cost.seconds)),
        ("  XLA's code", seconds(cost.fusion_seconds) + counted),
        ("  kernels", seconds(cost.kernel_seconds)),
        ("  waiting", f"{seconds(cost.waited_seconds)} for {_waited(c)}"),
    ]
    names = ", ".join(f"{name} x {count}" for name, count in sorted(cost.kernels.items()))
    rows.append(("kernels called", names or "none of the vendor or of Pallas"))
    if c.roofline_seconds is not None:
        reached = f"; {c.roofline_seconds / cost.seconds:.0%} reached" if cost.seconds else ""
        rows.append(("roofline", f"{seconds(c.roofline_seconds)} at the chips' peaks{reached}"))
    if cost.unknown_loops:
        loops = ", ".join(f"{p.operation} ({p.line or 'no line'})" for p in cost.unknown_loops)
        rows.append(("trips unknown", f"{loops}: counted once"))
    return rows


def _chips(c: Compilation) -> str:
    wafers, height, width = c.wafer.grid
    grid = f"{height}x{width}" if wafers == 1 else f"{wafers}x{height}x{width}"
    along: dict[str, list[str]] = {}
    for axis, link in (c.wafer.links or {}).items():
        if link.furthest:
            along.setdefault(str(link), []).append(axis)
    text = "".join(f"; along {' and '.join(axes)} {link}" for link, axes in along.items())
    return f"{grid} of {c.chip.name}{text}"


def _memory(c: Compilation) -> str:
    limit, total = c.chip.memory_bytes, c.memory.total
    if c.fits:
        return f"{size(total)} of {size(limit)} ({total / limit:.1%}): it fits"
    if not total:
        return f"it does not fit {size(limit)}"
    return f"{size(total)}, {size(total - limit)} more than the {size(limit)} of a chip"


def _waited(c: Compilation) -> str:
    hidden = c.sent_bytes - c.waited_bytes
    if not c.sent_bytes:
        return "nothing: it sends nothing"
    return f"{size(c.waited_bytes)} of {size(c.sent_bytes)}; {hidden / c.sent_bytes:.0%} hidden"


def sent_rows(c: Compilation) -> list[tuple[str, ...]]:
    """What is sent, by kind and axis: (kind, axes, times, bytes, bytes waited for, time)."""
    if c.cost is None:
        return []
    ordered = sorted(c.cost.sent.items(), key=lambda item: -item[1].bytes)
    return [
        (
            key.kind,
            " and ".join(key.axes) or "one chip",
            f"{sent.count:,.0f}",
            size(sent.bytes),
            size(sent.waited_bytes),
            seconds(sent.waited_seconds) if sent.waited_seconds else "hidden",
        )
        for key, sent in ordered
    ]


def array_head(c: Compilation) -> tuple[str, ...]:
    """The heads of the columns of `array_rows`."""
    bytes_of = "each, estimated" if c.arrays_estimated else "each"
    return (bytes_of, "live at the peak", "made by", "line")


def array_rows(c: Compilation) -> list[tuple[str, ...]]:
    """The largest arrays of a program that does not fit: (bytes, shape, operation, line)."""
    alike = collections.Counter(c.largest_arrays)
    ordered = sorted(alike.items(), key=lambda item: -item[0].bytes * item[1])[:_LONGEST]
    return [
        (
            size(array.bytes),
            f"{count} x {array.dtype}[{','.join(map(str, array.shape))}]",
            array.made_by,
            array.line,
        )
        for array, count in ordered
    ]


def longest_rows(c: Compilation) -> list[tuple[str, ...]]:
    """The operations that take longest: (time, operation, line)."""
    if c.cost is None:
        return []
    ordered = sorted(c.cost.places.items(), key=lambda item: -item[1])[:_LONGEST]
    return [(seconds(s), place.operation, place.line) for place, s in ordered if s]


def left_out(c: Compilation) -> list[tuple[str, str]]:
    """What the figures do not say, as (subject, text)."""
    link = c.chip.link_bytes_per_second
    rows = [("not measured", "nothing ran; the time is a model of the compiled schedule.")]
    if c.arrays_estimated:
        rows.append(
            ("arrays", "estimated by this library's own live ranges, of whole arrays as far as "
             "their layout is known; the compiler names none.")
        )  # fmt: skip
    elif c.largest_arrays:
        rows.append(("arrays", "a chip's parts, by the compiler; gaps between them add to these."))
    if c.cost is None:
        return rows
    if c.chip.clock_hz:
        rows.append(
            ("XLA's code", f"the compiler's own cycles at {c.chip.clock_hz / 1e9:.3g} GHz; copies "
             "to and from the vector memory that go on beside it have none.")
        )  # fmt: skip
    else:
        rows.append(
            ("XLA's code", "its compiler estimates no time: each operation at the chip's peak of "
             "FLOPs or of memory bandwidth, whichever takes longer.")
        )  # fmt: skip
    if c.cost.kernels:
        text = (
            "the longer of FLOPs and bytes at the chip's peaks, as a kernel states them (those of "
            "wk.attention on TPUs: the blocks that the busiest chip visits), else of its whole grid"
        )
        if c.cost.unpriced:
            names = ", ".join(sorted(c.cost.unpriced))
            text += f"; of {names} the FLOPs are not known, only bytes"
        rows.append(("kernels", text + "."))
    if c.cost.sent and link:
        rows.append(
            ("transfers", f"bytes that a chip receives at {with_unit(link, 'B/s')}, one link in one"
             " direction, both on an axis that closes to a ring; neither distance nor start.")
        )  # fmt: skip
    rows.append(("branches", "of a conditional the longest branch is counted."))
    return rows


def as_json(c: Compilation) -> dict[str, Any]:
    """The figures as JSON takes them."""
    wafers, height, width = c.wafer.grid
    fields: dict[str, Any] = {
        "program": c.name,
        "chip": c.chip.name,
        "grid": [wafers, height, width],
        "fits": c.fits,
        "memory_bytes": {
            "limit": c.chip.memory_bytes,
            "total": c.memory.total,
            "arguments": c.memory.arguments if c.fits else c.argument_bytes,
            "results": c.memory.results,
            "aliased": c.memory.aliased,
            "temporaries": c.memory.temporaries if c.fits else None,
            "code": c.memory.code,
        },
        "compiler": c.memory.refusal,
        "largest_arrays": [array._asdict() for array in c.largest_arrays],
        "arrays_estimated": c.arrays_estimated,
        "compile_seconds": c.compile_seconds,
        "trace_seconds": c.trace_seconds,
        "schedule": c.why_no_schedule or "read",
        "roofline_seconds": c.roofline_seconds,
    }
    if c.cost is None:
        return fields
    return fields | {
        "seconds": c.cost.seconds,
        "fusion_seconds": c.cost.fusion_seconds,
        "kernel_seconds": c.cost.kernel_seconds,
        "waited_seconds": c.cost.waited_seconds,
        "cycles": c.cost.cycles,
        "kernels": dict(c.cost.kernels),
        "sent": [
            {
                "kind": key.kind,
                "axes": list(key.axes),
                "count": sent.count,
                "bytes": sent.bytes,
                "waited_bytes": sent.waited_bytes,
                "waited_seconds": sent.waited_seconds,
            }
            for key, sent in c.cost.sent.items()
        ],
        "longest": [list(row) for row in longest_rows(c)],
        "unknown_loops": [list(place) for place in sorted(c.cost.unknown_loops)],
    }


def size(count: float) -> str:
    """Bytes with three digits: "7.13 GiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{float(f'{count / unit:.3g}'):,g} {name}"
    return f"{count:,.0f} B"


def seconds(value: float) -> str:
    """A time with three digits: "1.04 ms"."""
    return with_unit(value, "s")


def columns(rows: list[tuple[str, ...]], flush_right: tuple[int, ...] = (2, 3, 4)) -> list[str]:
    """Rows of cells as lines of text; the columns `flush_right` are so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(i: int, text: str) -> str:
        return text.rjust(widths[i]) if i in flush_right else text.ljust(widths[i])

    return ["  ".join(cell(i, text) for i, text in enumerate(row)).rstrip() for row in rows]
