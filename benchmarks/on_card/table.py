"""The table of a run on a card, short enough for the end of a log.

Checks take one row for each operation, and those that found no time one row together.
"""

import pathlib
from collections.abc import Sequence

from rich import box
from rich.table import Table

from benchmarks import harness
from benchmarks.on_card.row import Row, duration, quantity
from wsekern.atomic_write import atomic_write

_COLUMNS = (
    "section",
    "measurement",
    "candidate",
    "time",
    "ratio",
    "rate",
    "of the ceiling",
    "error",
    "compile",
    "note",
)
_WORDS = {"section", "measurement", "candidate", "note"}  # columns that are not figures


def show(rows: Sequence[Row], heading: str) -> None:
    """Prints the table, in Markdown if output is piped."""
    out = harness.console()
    if not out.is_terminal:
        print(_markdown(rows, heading), flush=True)
        return
    table = Table(box=box.HEAVY_HEAD)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in _WORDS else "right", overflow="fold")
    for cells in _table(rows):
        table.add_row(*cells)
    out.print(f"\n{heading}\n", highlight=False, markup=False)
    out.print(table)


def write_markdown(path: pathlib.Path, rows: Sequence[Row], heading: str) -> None:
    """Writes the table to a file."""
    with atomic_write(path) as file:
        file.write(_markdown(rows, heading).encode())


def _markdown(rows: Sequence[Row], heading: str) -> str:
    rules = ["---" if column in _WORDS else "---:" for column in _COLUMNS]
    lines = [f"\n{heading}\n", _line(_COLUMNS), _line(rules), *map(_line, _table(rows))]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The cells of every row."""
    checks = [row for row in rows if row.section == "correctness"]
    late = [row for row in checks if row.status == "no time"]
    right: dict[str, list[Row]] = {}
    for row in checks:
        if row.status == "done":
            right.setdefault(row.candidate, []).append(row)
    table = [_summary(operation, done) for operation, done in right.items()]
    table += [_cells(row) for row in checks if row.status not in ("done", "no time")]
    if late:
        note = f"no time: {late[0].measurement} to {late[-1].measurement}"
        table.append(("correctness", f"{len(late)} checks", *[""] * 7, note))
    first = [_cells(row) for row in rows if row.section == "ceilings"]
    others = [_cells(row) for row in rows if row.section not in ("ceilings", "correctness")]
    return first + table + others


def _summary(operation: str, checks: Sequence[Row]) -> tuple[str, ...]:
    """The cells of checks that passed, with the one that came nearest to its tolerance."""
    worst = max(checks, key=lambda row: (row.error or 0.0) / (row.tolerance or 1.0))
    count = f"{len(checks)} check{'s' * (len(checks) > 1)} right"
    error = f"{worst.error:.1e} of {worst.tolerance:.0e}"
    return "correctness", count, operation, *[""] * 4, error, "", worst.measurement


def _cells(row: Row) -> tuple[str, ...]:
    words = [] if row.status == "done" else [row.status]
    note = ": ".join([*words, row.note] if row.note else words)
    return (
        row.section,
        row.measurement,
        row.candidate,
        "" if row.seconds is None else duration(row.seconds),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.rate is None else quantity(row.rate, row.unit),
        "" if row.share is None else f"{row.share:.1%} of {row.ceiling}",
        "" if row.error is None else f"{row.error:.1e} of {row.tolerance:.0e}",
        "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
        "; ".join(part for part in (note, ", ".join(row.kernels)) if part),
    )
