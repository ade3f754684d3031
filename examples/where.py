"""What the scientific examples share: where to run, what to draw, what a wafer would take."""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import wsekern as wk
from wsekern.closed_pipe import end_on_closed_pipe
from wsekern.error_line import print_error
from wsekern.estimator.pictures import figure, output
from wsekern.wafer.launch import make_wafer, parse_grid, prepare_devices

_WHOLE = "720x720"  # most of a wafer


def flags(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with the flags `--wafer`, `--virtual`, `--estimate` and `--out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--wafer", metavar="HEIGHTxWIDTH", default="2x4", help="grid of devices (default: 2x4)"
    )
    where.add_argument("--virtual", metavar="HEIGHTxWIDTH", help="grid of virtual PEs instead")
    where.add_argument(
        "--estimate",
        metavar="HEIGHTxWIDTH",
        nargs="?",
        const=_WHOLE,
        help=f"only print what it costs on this grid of a WSE-3 (by itself: {_WHOLE})",
    )
    parser.add_argument("--out", default=out, help=f"file to draw to (default: {out})")
    return parser


def number(
    parser: argparse.ArgumentParser, flag: str, default: int, help: str, per_pe: int | None = None
) -> None:
    """Adds a flag that takes a whole number of 1 or more.

    With `per_pe`, its default for `--estimate` is that many for each PE: see `size`.
    """

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
        return value

    both = f"{default}" if per_pe is None else f"{default}; with --estimate {per_pe} for each PE"
    parser.add_argument(
        flag, type=positive, default=None if per_pe else default, help=f"{help} (default: {both})"
    )


def wafer_of(arguments: argparse.Namespace) -> wk.Wafer:
    """The wafer that the flags name. Call it before jax is used: it may emulate devices."""
    text = arguments.estimate or arguments.virtual or arguments.wafer
    wafers, height, width = parse_grid(text)
    if arguments.estimate:
        return wk.Wafer.abstract(wk.WSE3, height, width, wafers)
    # On TPUs and GPUs this emulates CPU devices in vain; jax prefers the real ones.
    prepare_devices(1 if arguments.virtual else wafers * height * width)
    return make_wafer(text, virtual=bool(arguments.virtual))


def check_out(*paths: str, film: str | None = None) -> None:
    """Ends the program now if a picture could not be written once it is computed."""
    figure.check_installed()
    for path in paths:
        output.check_writable(path, figure.SUFFIXES)
    if film is not None:
        output.check_writable(film, (".gif", ".mp4"))


def print_estimate(
    program: Callable, *operands: Any, wafer: wk.Wafer, launches: int, trips: int | None = None
) -> None:
    """Prints what `program(*operands)` costs on `wafer`, and beside it the fastest chip."""
    e = wk.estimate(program, *operands, wafer=wafer, launches=launches, trips=trips)
    print(e)
    chip, seconds = min(e.accelerators.items(), key=lambda item: item[1])
    pes, chip = f"{wafer.height}x{wafer.width} PEs", f"one {chip} at its roofline"
    fast, slow = (chip, pes) if seconds < e.seconds else (pes, chip)
    times = max(seconds, e.seconds) / min(seconds, e.seconds)
    many = f"{times:,.0f}" if times >= 100 else f"{times:.3g}"
    print(f"\n{fast}: {many} times as fast as {slow}")


def run(main: Callable[[], None]) -> None:
    """Runs the program; an option that cannot be served ends it with a sentence and status 2."""
    try:
        with end_on_closed_pipe():
            main()
    except (ValueError, OSError, ImportError) as error:
        print_error(pathlib.Path(sys.argv[0]).name, error)
        raise SystemExit(2) from None
