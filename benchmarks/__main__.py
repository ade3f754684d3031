"""This file is the command line of the benchmarks: it lists them, or runs one."""

import ast
import difflib
import importlib
import pathlib
import sys

from rich.console import Console
from rich.table import Table


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark that `argv` names first with the rest of `argv`; returns an exit status.

    Every module of this folder that has a `main(argv)` is a benchmark.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = _benchmarks()
    if not argv or argv[0] in ("-h", "--help"):
        _list(known)
        return 0
    name, *rest = argv
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"benchmarks: {name!r} is not one of {', '.join(known)}{hint}", file=sys.stderr)
        return 2
    importlib.import_module(f"benchmarks.{name}").main(rest)
    return 0


def _benchmarks() -> dict[str, str]:
    """What each benchmark is, by name; nothing is imported for it."""
    found = {}
    for file in sorted(pathlib.Path(__file__).parent.glob("[a-z]*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            summary = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[file.stem] = summary.removeprefix("This file is ")
    return found


def _list(known: dict[str, str]) -> None:
    table = Table(title="python -m benchmarks NAME [--help]", title_justify="left", box=None)
    table.add_column("name", style="bold")
    table.add_column("what it measures")
    for name, summary in known.items():
        table.add_row(name, summary)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
