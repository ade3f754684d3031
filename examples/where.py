"""This file is the flags that the scientific examples share: where they run, and what they draw."""

import argparse

import wsekern as wk
from wsekern.wafer.launch import make_wafer, parse_grid, prepare_devices


def flags(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with `--wafer`, `--virtual`, `--estimate` and `--out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--wafer", default="2x4", help="HEIGHTxWIDTH devices (default: 2x4)")
    where.add_argument("--virtual", metavar="HEIGHTxWIDTH", help="virtual PEs of a WSE-3 instead")
    where.add_argument(
        "--estimate", metavar="HEIGHTxWIDTH", help="say what it costs on so many PEs of a WSE-3"
    )
    parser.add_argument("--out", default=out, help=f"the picture (default: {out})")
    return parser


def wafer_of(asked: argparse.Namespace) -> wk.Wafer:
    """The wafer that the flags name; call it before jax is used: it may make devices."""
    text = asked.estimate or asked.virtual or asked.wafer
    try:
        wafers, height, width = parse_grid(text)
        if asked.estimate:
            return wk.Wafer.abstract(wk.WSE3, height, width, wafers)
        # On TPUs and GPUs this emulates CPU devices in vain; jax prefers the real ones.
        prepare_devices(1 if asked.virtual else wafers * height * width)
        return make_wafer(text, virtual=bool(asked.virtual))
    except ValueError as error:
        raise SystemExit(str(error)) from None


def number(parser: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Adds a flag that takes a whole number of 1 or more."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
        return value

    parser.add_argument(flag, type=positive, default=default, help=f"{help} (default: {default})")
