"""`wsekern compile`: what a chip's own compiler makes of a program; no chip is needed.

jax is imported only once the command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from typing import Any

from wsekern.error_line import print_error
from wsekern.estimator.command import check_operands, load_program, parse_shape
from wsekern.progress import show_progress
from wsekern.wafer.launch import make_topology

_DESCRIPTION = (
    "compiles a program for TPUs or GPUs that need not be there, and prints whether it fits, what "
    "it sends and waits for, the kernels it calls, and its time by a model; nothing is run"
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Adds the command to those of `wsekern`."""
    parser = commands.add_parser("compile", help=_DESCRIPTION, description=_DESCRIPTION)
    parser.add_argument(
        "program", metavar="FILE.py:FUNCTION",
        help="a jax function; its operands are --shapes, or the variable SHAPES of FILE.py: a "
        "list, or a function that makes one for the wafer it is given",
    )  # fmt: skip
    parser.add_argument(
        "--target", required=True, metavar="TOPOLOGY",
        help="chips to compile for: v5e:4x4, v6e:16x16, v5p:4x4x4, tpu7x:4x4x4, h100:2x4",
    )  # fmt: skip
    parser.add_argument(
        "--wafer", metavar="GRID",
        help="another grid of the same chips, HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", nargs="*", metavar="SHAPE", help="shapes of the operands, as 4096x4096:bfloat16"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", metavar="FILE.html", help="write the report as one web page")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Runs the command; ends the process with status 2 if its arguments cannot be served.

    A program that does not fit its chips ends it with status 1, after the report.
    """
    try:
        fits = _compile(arguments)
    except BrokenPipeError:  # the reader has gone; `cli.main` ends quietly
        raise
    except (ValueError, OSError, ImportError) as error:
        print_error("wsekern compile", error)
        raise SystemExit(2) from None
    if not fits:
        raise SystemExit(1)


def _compile(arguments: argparse.Namespace) -> bool:
    # No device of this machine is needed, and libtpu would look for TPUs.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    from wsekern.compiler.compile import compile as compile_program
    from wsekern.estimator.pictures import output

    if arguments.html is not None:
        output.check_writable(arguments.html)
    wafer = make_topology(arguments.target, arguments.wafer)
    with wafer:
        function, shapes = load_program(arguments.program)
        if callable(shapes):
            shapes = shapes(wafer)
    if arguments.shapes is not None:
        shapes = [parse_shape(text) for text in arguments.shapes]
    check_operands(arguments.program, function, shapes)
    name = pathlib.Path(arguments.program).name
    with show_progress(f"wsekern compile: compiling for {arguments.target}"):
        try:
            compilation = compile_program(function, *shapes, wafer=wafer, name=name)
        except jax.errors.JaxRuntimeError as error:
            lines = " ".join(str(error).split())
            raise ValueError(
                f"the compiler of {arguments.target} refuses {name}: {lines}"
            ) from None
    if arguments.html is not None:
        compilation.html(arguments.html)
    if arguments.json:
        print(json.dumps(compilation.as_json(), indent=2))
    else:
        print(compilation)
    return compilation.fits
