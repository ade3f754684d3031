"""Compile one program several times: at other sizes, to find the largest that fits, or on grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wsekern.compiler.report import columns, seconds, size
from wsekern.compiler.result import Compilation
from wsekern.wafer.wafer import Wafer

_MOST_DOUBLINGS = 24


def largest_that_fits(
    compile_at: Callable[[int], Compilation], start: int, unit: int = 1
) -> tuple[int | None, dict[int, Compilation]]:
    """The largest size at which a program fits, and all compilations on the way there.

    From `start` the size is doubled or halved until one fits and one does not; then the middle is
    tried, until they are neighbors. Each try takes a compilation.

    Args:
      compile_at: compiles the program at a size.
      start: the size to try first, a multiple of `unit`.
      unit: sizes are multiples of this.

    Returns:
      The size, None if none fits; and the compilations by size.

    Raises:
      ValueError: `start` is not a positive multiple of `unit`.
    """
    if start < 1 or start % unit:
        raise ValueError(f"the size {start} must be a positive multiple of {unit}")
    tried: dict[int, Compilation] = {}

    def fits(units: int) -> bool:
        if units * unit not in tried:
            tried[units * unit] = compile_at(units * unit)
        return tried[units * unit].fits

    good, bad = 0, start // unit
    for _ in range(_MOST_DOUBLINGS):
        if not fits(bad):
            break
        good, bad = bad, 2 * bad
    else:
        return good * unit, tried
    # Below `start` the sizes are halved: the smallest may fit although `start` is far too large.
    while good == 0 and bad > 1:
        middle = bad // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    while good and good + 1 < bad:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return (good * unit if good else None), tried


def compare_wafers(
    compile_on: Callable[[Wafer], Compilation], wafers: Mapping[str, Wafer]
) -> tuple[str, Compilation | None]:
    """A table of a program on several grids, and its fastest compilation of those that fit."""
    found = {grid: compile_on(wafer) for grid, wafer in wafers.items()}
    fitting = [c for c in found.values() if c.fits]
    fastest = min(fitting, key=lambda c: c.seconds or float("inf"), default=None)
    text = comparison("grid", found)
    return text + ("\n\nthe fastest of those that fit:\n" if fastest else ""), fastest


def search_batch(
    compile_at: Callable[[int], Compilation], start: int, unit: int
) -> tuple[str, Compilation]:
    """A table of the batches tried, and the compilation of the largest that fits.

    Of the smallest one tried, if none fits. Arguments as for `largest_that_fits`.
    """
    batch, tried = largest_that_fits(compile_at, start, unit)
    text = comparison("batch", {f"{size:,}": tried[size] for size in sorted(tried)})
    if batch is None:
        return f"{text}\n\nnone fits; the smallest, {min(tried):,}:\n", tried[min(tried)]
    return f"{text}\n\nthe largest batch that fits: {batch:,}\n", tried[batch]


def comparison(heading: str, compilations: Mapping[str, Compilation | str]) -> str:
    """Compilations side by side, as a table of text.

    Args:
      heading: of the first column, such as "grid".
      compilations: by name; a text says why there is none.
    """
    head = (heading, "fits", "memory", "temporaries", "time", "waited for", "sent", "compiled in")
    rows: list[tuple[str, ...]] = [head]
    for name, c in compilations.items():
        if isinstance(c, str):
            rows.append((name, c, *[""] * 6))
            continue
        known = c.cost is not None and c.seconds is not None
        rows.append(
            (
                name,
                "yes" if c.fits else "no",
                size(c.memory.total) if c.memory.total else "-",
                size(c.memory.temporaries) if c.fits else "-",
                seconds(c.seconds) if known and c.seconds is not None else "-",
                size(c.waited_bytes) if known else "-",
                size(c.sent_bytes) if known else "-",
                f"{c.compile_seconds:.0f} s",
            )
        )
    return "\n".join(columns(rows, flush_right=(2, 3, 4, 5, 6, 7)))
