"""Damaged and hostile files, kills and signals: how many of each kind end as they should.

`python -m benchmarks reliability` makes every case from `--seed`, runs them one after another, and
prints a table: kind, tried, right. A case that ends wrongly is named with what it did. Right means
the right result, or an error that names the file and what is wrong with it: never another result, a
traceback from inside a library, minutes of work, or gigabytes of memory.
"""

import dataclasses
import fnmatch
import importlib
import pathlib
import pkgutil
import tempfile

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import benchmarks.damage
from benchmarks.damage.case import Case


@dataclasses.dataclass(frozen=True)
class _Options:
    """Run what goes wrong on purpose, and count what ends as it should."""

    kinds: tuple[str, ...] = ()  # rows of the table, such as "bit flips"; none: all of them
    names: str = "*"  # only the cases whose name matches, such as "*gguf*"
    seed: int = 0  # of the damage


def main(argv: list[str] | None = None) -> None:
    """Runs the cases of `argv`'s flags and prints the table.

    Raises:
      SystemExit: With status 1, once everything has run, if any case ended wrongly.
    """
    options = tyro.cli(_Options, args=argv, prog="python -m benchmarks reliability")
    console = Console()
    tried: dict[str, int] = {}
    wrong: dict[str, list[str]] = {}
    chosen = [
        case
        for case in collect(options.seed)
        if (not options.kinds or case.kind in options.kinds)
        and fnmatch.fnmatch(case.name, options.names)
    ]
    for case in track(chosen, console=console, description="cases"):
        tried[case.kind] = tried.get(case.kind, 0) + 1
        if problem := failure(case):
            wrong.setdefault(case.kind, []).append(f"{case.name}: {problem}")
    console.print(_table(tried, wrong))
    for kind, problems in wrong.items():
        for problem in problems:
            console.print(f"{kind}: {problem}", markup=False, soft_wrap=True)
    if wrong:
        raise SystemExit(1)


def collect(seed: int) -> list[Case]:
    """The cases of every module of `benchmarks.damage` that has `cases(seed)`."""
    cases: list[Case] = []
    for module in pkgutil.iter_modules(benchmarks.damage.__path__, "benchmarks.damage."):
        make_cases = getattr(importlib.import_module(module.name), "cases", None)
        if make_cases:
            cases += make_cases(seed)
    return cases


def failure(case: Case) -> str | None:
    """What went wrong with `case`, run in an empty folder of its own; None if nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.check(pathlib.Path(folder))
        except Exception as error:  # whatever a case raises is what went wrong with it
            return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def _table(tried: dict[str, int], wrong: dict[str, list[str]]) -> Table:
    table = Table(title="What goes wrong on purpose", title_justify="left", box=None)
    table.add_column("kind", style="bold")
    table.add_column("tried", justify="right")
    table.add_column("right", justify="right")
    for kind, count in tried.items():
        table.add_row(kind, str(count), str(count - len(wrong.get(kind, []))))
    return table
