"""This file is `wsekern estimate`: what a program costs, or the model held to measurements."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from wsekern.hardware import MACHINES, Machine
from wsekern.wafer.launch import parse_height_width

_TELL = (
    "prints what a program costs on a wafer: cycles, time, energy, memory, traffic, and the "
    "operations that take longest; nothing is computed"
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to those of `wsekern`."""
    parser = commands.add_parser("estimate", help=_TELL, description=_TELL)
    parser.add_argument(
        "program", nargs="?", metavar="FILE.py:FUNCTION",
        help="a jax function; its operands are --shapes, or what FILE.py calls SHAPES",
    )  # fmt: skip
    parser.add_argument("--machine", default="cs-3", help="wafer or system (default: cs-3)")
    parser.add_argument("--grid", help="HEIGHTxWIDTH PEs (default: all that a program can use)")
    parser.add_argument("--wafers", type=int, default=1, help="how many (default: 1)")
    parser.add_argument(
        "--pe-yield", type=float, metavar="SHARE",
        help="of the PEs that work, drawn at random; moves take the hops around the others",
    )  # fmt: skip
    parser.add_argument("--clock", type=float, metavar="GHZ", help="(default: the machine's)")
    parser.add_argument(
        "--shapes", nargs="*", metavar="SHAPE", help="operands, as 4096x4096:float16"
    )
    parser.add_argument(
        "--density", type=float, default=1.0,
        help="share of a product's factors that are not zero: others are skipped (default: 1)",
    )  # fmt: skip
    parser.add_argument("--trips", type=int, help="how often loops of unknown length run")
    parser.add_argument(
        "--validate", nargs="?", const="", metavar="POINTS.csv",
        help="predict published points instead, or those of a table of your own",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE.html", help="write it all as one page")
    parser.add_argument("--trace", metavar="FILE.json", help="write a timeline, for Perfetto")
    parser.add_argument(
        "--plot", metavar="FILE.png",
        help="write a map of the wafer's links; with --validate, predicted against published",
    )  # fmt: skip
    parser.add_argument(
        "--map", nargs="?", const="load", metavar="QUANTITY",
        help="print a map of the wafer: load (the default), N, E, S, W, busy or sram",
    )  # fmt: skip
    return parser


def run(asked: argparse.Namespace) -> None:
    """Prints what is asked for; ends with status 2 where that cannot be."""
    try:
        _check_outputs(asked)
        if asked.validate is not None:
            return _validate(asked.validate, asked.json, asked.plot)
        if asked.program is None:
            raise ValueError("name a program, as FILE.py:FUNCTION, or --validate")
        _estimate(asked)
    except (ValueError, OSError, ImportError) as error:
        print(f"wsekern estimate: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def machine_called(name: str) -> Machine:
    """The machine of a name or of a system, however it is written.

    Raises:
      ValueError: there is none; says which is nearest.
    """
    known = {_plain(n): m for m in MACHINES for n in (m.name, m.system)}
    if _plain(name) in known:
        return known[_plain(name)]
    names = [n for m in MACHINES for n in (m.name, m.system)]
    near = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
    raise ValueError(f"machine {name!r} is not known; {hint}")


def _estimate(asked: argparse.Namespace) -> None:
    machine = machine_called(asked.machine)
    function, given = _loaded(asked.program)
    shapes = given if asked.shapes is None else [_shape(text) for text in asked.shapes]

    from wsekern.estimator.estimate import estimate
    from wsekern.wafer.placement.defects import Defects
    from wsekern.wafer.wafer import Wafer

    height, width = parse_height_width(asked.grid) if asked.grid else (None, None)
    defects = None if asked.pe_yield is None else Defects.random(machine, asked.pe_yield)
    wafer = Wafer.abstract(machine, height, width, asked.wafers, defects=defects)
    clock = asked.clock and asked.clock * 1e9
    options = {"clock_hz": clock, "trips": asked.trips, "density": asked.density}
    e = estimate(function, *shapes, wafer=wafer, **options)
    _draw(e, asked)
    if not asked.json:
        return print(e)
    names = [f.name for f in dataclasses.fields(e) if f.name not in ("wafer", "events", "tiles")]
    fields = {name: getattr(e, name) for name in names}
    derived = ("seconds", "energy", "bound", "fits", "sram_free", "host_seconds")
    fields |= {name: getattr(e, name) for name in derived}
    fields |= {"machine": machine.name, "grid": [wafer.height, wafer.width, wafer.wafers]}
    print(json.dumps(fields, indent=2))


def _draw(e: Any, asked: argparse.Namespace) -> None:
    from wsekern.estimator.pictures.terminal import terminal_map
    from wsekern.estimator.pictures.wafer_map import wafer_map

    if asked.map is not None:
        terminal_map(e, asked.map)
        print()
    if asked.plot is not None:
        wafer_map(e, path=asked.plot)
    if asked.trace is not None:
        e.timeline(asked.trace)
    if asked.html is not None:
        e.html(asked.html, pathlib.Path(asked.program).name)


def _check_outputs(asked: argparse.Namespace) -> None:
    """Refuses what cannot be written or drawn, before anything is estimated."""
    from wsekern.estimator.pictures import figure, output, quantities

    if asked.validate is not None:
        for flag in ("html", "trace", "map"):
            if getattr(asked, flag) is not None:
                raise ValueError(
                    f"--{flag} is of a program, not of --validate; give FILE.py:FUNCTION"
                )
    for path, suffixes in (
        (asked.html, ()), (asked.trace, ()), (asked.plot, figure.SUFFIXES)
    ):  # fmt: skip
        if path is not None:
            output.check_writable(path, suffixes)
    paths = [path for path in (asked.html, asked.trace, asked.plot) if path is not None]
    if len({str(pathlib.Path(path).resolve()) for path in paths}) < len(paths):
        raise ValueError("--html, --trace and --plot name one file twice")
    if asked.html is not None or asked.plot is not None:
        figure.check_installed()
    if asked.map is not None:
        quantities.check_quantity(asked.map)
        if asked.json:
            raise ValueError(
                "--map prints a picture, and --json nothing but JSON; give one of them"
            )


def _validate(table: str, as_json: bool, plot: str | None) -> None:
    from wsekern.estimator.pictures.published import published
    from wsekern.estimator.validation import points

    found = points.validate(table or points.POINTS)
    if plot is not None:
        published(found, plot)
    if as_json:
        for point, why in found.skipped.items():
            print(f"left out: {point}: {why}", file=sys.stderr)
        return print(found.as_json())
    print(found)
    if not table:
        print("fitted anew without one kind of program, mean absolute error of that kind:", end="")
        sys.stdout.flush()
        errors = points.cross_validate()
        print(" " + ", ".join(f"{name} {error:.1%}" for name, error in errors.items()))


def _loaded(program: str) -> tuple[Callable, Sequence[Any]]:
    """The function, and what its file calls SHAPES."""
    path, _, name = program.rpartition(":")
    if not path:
        raise ValueError(f"{program!r} names no function; write FILE.py:FUNCTION")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    here = str(pathlib.Path(path).resolve().parent)
    sys.path.insert(0, here)
    try:
        names = runpy.run_path(path, run_name=pathlib.Path(path).stem)
    finally:
        sys.path.remove(here)
    function = names.get(name)
    if not callable(function):
        functions = [n for n, v in names.items() if callable(v) and not n.startswith("_")]
        near = difflib.get_close_matches(name, functions, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(functions)}"
        raise ValueError(f"{path} has no function {name!r}; {hint}")
    return function, names.get("SHAPES", ())


def _shape(text: str) -> Any:
    found = re.fullmatch(r"(\d+(?:x\d+)*|):(\w+)", text)
    if not found:
        raise ValueError(f"shape {text!r} is not like 4096x4096:float16, or :float32 for a scalar")
    import jax
    import jax.numpy as jnp

    try:
        dtype = jnp.dtype(found[2])
    except TypeError:
        raise ValueError(f"shape {text!r}: {found[2]!r} is no dtype") from None
    return jax.ShapeDtypeStruct(tuple(int(n) for n in found[1].split("x") if n), dtype)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
