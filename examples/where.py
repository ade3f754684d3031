"""This file is the flags that the scientific examples share: where they run, and what they draw."""

import argparse

import wsekern as wk


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
        height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise SystemExit(f"{text!r} is no grid; write HEIGHTxWIDTH, such as 2x4") from None
    if asked.estimate:
        return wk.Wafer.abstract(wk.WSE3, height, width)
    if asked.virtual:
        return wk.Wafer.virtual(wk.WSE3, height, width)
    wk.emulate_devices(height * width)  # real ones are taken where there are any
    return wk.Wafer.devices(height, width)


def number(parser: argparse.ArgumentParser, flag: str, default: int, help: str) -> None:
    """Adds a flag that takes a whole number of 1 or more."""

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"{value} must be 1 or more")
        return value

    parser.add_argument(flag, type=positive, default=default, help=f"{help} (default: {default})")
