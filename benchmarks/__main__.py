"""The command line of the benchmarks: list them, or run one.

`python -m benchmarks` lists them, `python -m benchmarks NAME` runs one.
"""

import ast
import difflib
import importlib
import itertools
import pathlib
import sys

from rich.console import Console
from rich.table import Table

from wsekern.closed_pipe import end_on_closed_pipe
from wsekern.estimator.pictures.output import check_writable
from wsekern.interrupts import end_at_interrupt


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark `argv[0]` with the flags `argv[1:]`; returns an exit status.

    Every module of this folder that has a `main(argv)` is a benchmark.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = _summaries()
    if not argv or argv[0] in ("-h", "--help"):
        with end_on_closed_pipe():
            _list(known)
        return 0
    name, *flags = argv
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"benchmarks: {name!r} is not one of {', '.join(known)}{hint}", file=sys.stderr)
        return 2
    try:
        _check_json(flags)
    except OSError as error:
        print(f"benchmarks: --json: {error}", file=sys.stderr)
        return 2
    with end_on_closed_pipe():
        importlib.import_module(f"benchmarks.{name}").main(flags)
    return 0


def _check_json(flags: list[str]) -> None:
    """Raises OSError before anything is timed if the file of `--json` could not be written."""
    for flag, value in itertools.zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, path = flag.partition("=")
        if name == "--json":
            check_writable(path if equals else value)


def _summaries() -> dict[str, str]:
    """The first line of each benchmark's docstring by name; reads the files, imports none."""
    summaries = {}
    for file in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summaries[file.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return summaries


def _list(known: dict[str, str]) -> None:
    table = Table(title="python -m benchmarks NAME [--help]", title_justify="left", box=None)
    table.add_column("name", style="bold")
    table.add_column("what is compared")
    for name, summary in known.items():
        table.add_row(name, summary)
    Console().print(table)
    print("\nRESULTS.md in this folder has the figures measured last.")


if __name__ == "__main__":
    end_at_interrupt("benchmarks")
    sys.exit(main())
