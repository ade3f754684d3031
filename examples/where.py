"""The flags that the scientific examples share: where to run, and what to draw."""

import argparse

import wsekern as wk
from wsekern.wafer.launch import make_wafer, parse_grid, prepare_devices


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
        help="only print what it costs on this grid of a WSE-3",
    )
    parser.add_argument("--out", default=out, help=f"file to draw to (default: {out})")
    return parser


def wafer_of(arguments: argparse.Namespace) -> wk.Wafer:
    """The wafer that the flags name. Call it before jax is used: it may emulate devices."""
    text = arguments.estimate or arguments.virtual or arguments.wafer
    try:
        wafers, height, width = parse_grid(text)
        if arguments.estimate:
            return wk.Wafer.abstract(wk.WSE3, height, width, wafers)
        # On TPUs and GPUs this emulates CPU devices in vain; jax prefers the real ones.
        prepare_devices(1 if arguments.virtual else wafers * height * width)
        return make_wafer(text, virtual=bool(arguments.virtual))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def number(parser: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Adds a flag that takes a whole number of 1 or more."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
        return value

    parser.add_argument(flag, type=positive, default=default, help=f"{help} (default: {default})")
