"""`wsekern estimate`: the cost of a program, or the model's predictions of published measurements.

jax is imported only once a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from wsekern.error_line import print_error
from wsekern.hardware import MACHINES, Machine, clock_from_ghz
from wsekern.progress import show_progress
from wsekern.wafer.launch import parse_height_width

_DESCRIPTION = (
    "prints what a program costs on a wafer: cycles, time, energy, memory, traffic, and the "
    "operations that take longest; nothing is computed"
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to those of `wsekern`."""
    parser = commands.add_parser("estimate", help=_DESCRIPTION, description=_DESCRIPTION)
    parser.add_argument(
        "program", nargs="?", metavar="FILE.py:FUNCTION",
        help="a jax function; its operands are --shapes, or the variable SHAPES of FILE.py",
    )  # fmt: skip
    parser.add_argument("--machine", default="cs-3", help="a wafer or a system (default: cs-3)")
    parser.add_argument("--grid", help="HEIGHTxWIDTH, in PEs (default: all that a program can use)")
    parser.add_argument("--wafers", type=int, default=1, help="number of wafers (default: 1)")
    parser.add_argument(
        "--pe-yield", type=float, metavar="SHARE",
        help="share of PEs that work, from 0 to 1, drawn at random; moves go around the others",
    )  # fmt: skip
    parser.add_argument(
        "--clock", type=float, metavar="GHZ", help="clock rate (default: the machine's)"
    )
    parser.add_argument(
        "--shapes", nargs="*", metavar="SHAPE", help="shapes of the operands, as 4096x4096:float16"
    )
    parser.add_argument(
        "--density", type=float, default=1.0,
        help="share of a product's factors that are not zero; zeros are skipped (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--trips", type=int, help="number of trips of a while loop, which a trace does not say"
    )
    parser.add_argument(
        "--launches", type=int, default=1,
        help="kernels that a GPU launches at least, such as one a step (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--validate", nargs="?", const="", metavar="POINTS.csv",
        help="predict published measurements instead, or those of a table of your own",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", metavar="FILE.html", help="write one web page with all figures and pictures"
    )
    parser.add_argument(
        "--trace", metavar="FILE.json", help="write a timeline, which https://ui.perfetto.dev opens"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png",
        help="write a map of the wafer's links (.png, .svg or .pdf); with --validate, a plot of "
        "predicted against published",
    )  # fmt: skip
    parser.add_argument(
        "--map", nargs="?", const="load", metavar="QUANTITY",
        help="print a map of the wafer: load (the default), N, E, S, W, busy or sram",
    )  # fmt: skip
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Runs the command; ends the process with status 2 if its arguments cannot be served."""
    try:
        _check_outputs(arguments)
        if arguments.validate is not None:
            return _validate(arguments.validate, arguments.json, arguments.plot)
        if arguments.program is None:
            raise ValueError("name a program, as FILE.py:FUNCTION, or --validate")
        _estimate(arguments)
    except BrokenPipeError:  # the reader has gone; `cli.main` ends quietly
        raise
    except (ValueError, OSError, ImportError) as error:
        print_error("wsekern estimate", error)
        raise SystemExit(2) from None


def machine_called(name: str) -> Machine:
    """The machine with this name or system: "CS-3", "cs3" and "WSE-3" are one machine.

    Raises:
      ValueError: there is none; the message has the nearest name.
    """
    known = {_plain(n): m for m in MACHINES for n in (m.name, m.system)}
    if _plain(name) in known:
        return known[_plain(name)]
    names = [n for m in MACHINES for n in (m.name, m.system)]
    near = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
    raise ValueError(f"machine {name!r} is not known; {hint}")


def _estimate(arguments: argparse.Namespace) -> None:
    machine = machine_called(arguments.machine)
    clock_hz = clock_from_ghz(arguments.clock)
    function, shapes = load_program(arguments.program)
    if arguments.shapes is not None:
        shapes = [parse_shape(text) for text in arguments.shapes]
    check_operands(arguments.program, function, shapes)

    from wsekern.estimator.estimate import estimate
    from wsekern.wafer.placement.defects import Defects
    from wsekern.wafer.wafer import Wafer

    height, width = parse_height_width(arguments.grid) if arguments.grid else (None, None)
    defects = None if arguments.pe_yield is None else Defects.random(machine, arguments.pe_yield)
    wafer = Wafer.abstract(machine, height, width, arguments.wafers, defects=defects)
    options = {name: getattr(arguments, name) for name in ("trips", "density", "launches")}
    with show_progress("wsekern estimate: tracing and walking the program"):
        e = estimate(function, *shapes, wafer=wafer, clock_hz=clock_hz, **options)
    _draw(e, arguments)
    if not arguments.json:
        return print(e)
    # The wafer is given by its machine and its grid. Events and link patterns are large, and have
    # outputs of their own.
    names = [f.name for f in dataclasses.fields(e) if f.name not in ("wafer", "events", "tiles")]
    fields = {name: getattr(e, name) for name in names}
    derived = ("seconds", "energy", "bound", "fits", "sram_free", "host_seconds")
    fields |= {name: getattr(e, name) for name in derived}
    fields |= {"machine": machine.name, "grid": [wafer.height, wafer.width, wafer.wafers]}
    print(json.dumps(fields, indent=2))


def _draw(e: Any, arguments: argparse.Namespace) -> None:
    from wsekern.estimator.pictures.terminal import terminal_map
    from wsekern.estimator.pictures.wafer_map import wafer_map

    if arguments.map is not None:
        terminal_map(e, arguments.map)
        print()
    if arguments.plot is not None:
        wafer_map(e, path=arguments.plot)
    if arguments.trace is not None:
        e.timeline(arguments.trace)
    if arguments.html is not None:
        e.html(arguments.html, pathlib.Path(arguments.program).name)


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises before anything is estimated if an output cannot be written or drawn."""
    from wsekern.estimator.pictures import figure, output, quantities

    if arguments.validate is not None:
        for flag in ("html", "trace", "map"):
            if getattr(arguments, flag) is not None:
                raise ValueError(
                    f"--{flag} is of a program, not of --validate; give FILE.py:FUNCTION"
                )
    for path, suffixes in (
        (arguments.html, ()), (arguments.trace, ()), (arguments.plot, figure.SUFFIXES)
    ):  # fmt: skip
        if path is not None:
            output.check_writable(path, suffixes)
    paths = [path for path in (arguments.html, arguments.trace, arguments.plot) if path is not None]
    if len({str(pathlib.Path(path).resolve()) for path in paths}) < len(paths):
        raise ValueError("--html, --trace and --plot name one file twice")
    if arguments.html is not None or arguments.plot is not None:
        figure.check_installed()
    if arguments.map is not None:
        quantities.check_quantity(arguments.map)
        if arguments.json:
            raise ValueError(
                "--map prints a picture, and --json nothing but JSON; give one of them"
            )


def _validate(table: str, as_json: bool, plot: str | None) -> None:
    from wsekern.estimator.pictures.published import plot_published
    from wsekern.estimator.validation import points

    with show_progress("wsekern estimate: predicting the points"):
        validation = points.validate(table or points.POINTS)
    if plot is not None:
        plot_published(validation, plot)
    if as_json:
        for point, why in validation.skipped.items():
            print(f"left out: {point}: {why}", file=sys.stderr)
        return print(validation.as_json())
    print(validation)
    if not table:
        with show_progress("wsekern estimate: fitting anew without each kind of program"):
            errors = points.cross_validate()
        print("fitted anew without one kind of program, mean absolute error of that kind: ", end="")
        print(", ".join(f"{name} {error:.1%}" for name, error in errors.items()))


def load_program(program: str) -> tuple[Callable, Sequence[Any]]:
    """The function that FILE.py:FUNCTION names, and the variable SHAPES of its file."""
    path, _, name = program.rpartition(":")
    if not path:
        raise ValueError(f"{program!r} names no function; write FILE.py:FUNCTION")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    # As `python FILE.py` would: the file may import its neighbors.
    folder = str(pathlib.Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        names = runpy.run_path(path, run_name=pathlib.Path(path).stem)
    finally:
        sys.path.remove(folder)
    function = names.get(name)
    if not callable(function):
        functions = [n for n, v in names.items() if callable(v) and n != "SHAPES" and n[0] != "_"]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(functions)}"
        raise ValueError(f"{path} has no function {name!r}; {hint}")
    return function, names.get("SHAPES", ())


def check_operands(program: str, function: Callable, shapes: Any) -> None:
    """Raises ValueError if SHAPES is no list, or the function takes more or fewer operands."""
    if not isinstance(shapes, list | tuple):
        raise ValueError(
            f"{program}: the variable SHAPES is {shapes!r}; it must be a list or tuple of operands"
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a function that does not say what it takes
        return
    try:
        signature.bind(*shapes)
    except TypeError:
        raise ValueError(
            f"{program}{signature} cannot be called with {len(shapes)} operands; give the shape of "
            "each, as --shapes 4096x4096:float16, or in the variable SHAPES of its file"
        ) from None


def parse_shape(text: str) -> Any:
    """The `jax.ShapeDtypeStruct` that "4096x4096:float16" names.

    Raises:
      ValueError: the text is not of this form, or the dtype is unknown.
    """
    match = re.fullmatch(r"(\d+(?:x\d+)*|):(\w+)", text)
    if not match:
        raise ValueError(f"shape {text!r} is not like 4096x4096:float16, or :float32 for a scalar")
    import jax
    import jax.numpy as jnp

    try:
        dtype = jnp.dtype(match[2])
    except TypeError:
        raise ValueError(f"shape {text!r}: {match[2]!r} is no dtype") from None
    return jax.ShapeDtypeStruct(tuple(int(n) for n in match[1].split("x") if n), dtype)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
