"""The `wsekern` command: what this machine offers, what a program costs, the benchmarks.

Jax is loaded only when a command needs it, so that every `--help` answers at once.
"""

import argparse
import difflib
import importlib.metadata
import os
import pathlib
import runpy
import sys
from collections.abc import Sequence

from wsekern.closed_pipe import end_on_closed_pipe
from wsekern.compiler import compile_command
from wsekern.estimator import command
from wsekern.hardware import (
    ACCELERATORS,
    GB,
    KIB,
    MACHINES,
    TERA,
    Accelerator,
    Machine,
    accelerator,
)
from wsekern.interrupts import end_at_interrupt
from wsekern.wafer.libtpu import keep_libtpu_quiet

_CHECKOUT = pathlib.Path(__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line; ends the process with status 2 if it is wrong.

    Args:
      argv: the arguments; by default those of this process.
    """
    if argv is None:
        end_at_interrupt("wsekern")
    words = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands are {', '.join(commands)}"
        parser.error(f"{name!r} is not a command; {hint}")
    if words[:1] == ["bench"] and words[1:2] not in (["-h"], ["--help"]):
        return bench(words[1:])  # the benchmarks parse their own flags
    arguments = parser.parse_args(words)
    with end_on_closed_pipe():
        if name == "estimate":
            return command.run(arguments)
        if name == "compile":
            return compile_command.run(arguments)
        return info() if name else parser.print_help()


def info() -> None:
    """Prints the devices that jax finds, the grid they make, and the figures of known machines."""
    print("\n".join(_device_lines()))
    wafers = ["wafer", "PEs to use", "SRAM of a PE", "of all", "clock", "float32", "16-bit"]
    print("", *_columns([wafers, *map(_wafer_row, MACHINES)]), sep="\n")
    chips = ["accelerator", "memory", "bandwidth", "float32", "16-bit"]
    print("", *_columns([chips, *map(_chip_row, ACCELERATORS)]), sep="\n")


def bench(words: Sequence[str]) -> None:
    """Runs `python -m benchmarks` of the checkout that this library is installed from.

    Args:
      words: its arguments.
    """
    if not (_CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise SystemExit(
            "wsekern bench: the benchmarks are in the repository, not in the installed package; "
            "clone it, and in the clone run `pip install -e '.[train]'` and then `wsekern bench`"
        )
    # Ahead of every other folder that happens to be called benchmarks.
    sys.path.insert(0, str(_CHECKOUT))
    sys.argv = ["wsekern bench", *words]
    runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)


def _parsers() -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser(
        prog="wsekern", description="Kernels for a wafer-scale engine, seen by JAX as a 2D mesh."
    )
    version = importlib.metadata.version("wsekern")
    parser.add_argument("--version", action="version", version=f"wsekern {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    text = "prints the devices that jax finds, the grid they make, and figures of known machines"
    commands.add_parser("info", help=text, description=text)
    command.add_parser(commands)
    compile_command.add_parser(commands)
    text = "lists the benchmarks of a checkout, or runs one of them"
    usage = "wsekern bench [-h] [NAME [OPTION ...]]"
    bench_parser = commands.add_parser("bench", help=text, usage=usage)
    bench_parser.description = "Runs `python -m benchmarks`; see `wsekern bench NAME --help` too."
    return parser, list(commands.choices)


def _device_lines() -> list[str]:
    import jax
    import jaxlib

    keep_libtpu_quiet()
    python = ".".join(str(part) for part in sys.version_info[:3])
    wsekern = importlib.metadata.version("wsekern")
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter in jax 0.10, with no message
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise SystemExit(
            f"wsekern info: jax finds no device with JAX_PLATFORMS={platforms!r}; set it to cpu, "
            f"or install the jax of that platform. {error}"
        ) from None
    kind, count = devices[0].device_kind, len(devices)
    height, width = _squarest(count)
    peak = _peak_of(kind)
    return [
        f"wsekern {wsekern}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, Python {python}",
        f"devices: {count} x {kind}, {_nature(devices[0].platform, count)}{peak}",
        f"grid of them all: wk.Wafer.devices(height={height}, width={width})",
    ]


def _nature(platform: str, count: int) -> str:
    if platform != "cpu":
        return "real"
    if count > 1:
        return "emulated on the CPU"
    return "real (wk.emulate_devices(8), called before jax starts, makes it 8)"


def _peak_of(kind: str) -> str:
    chip = accelerator(kind)
    return f", each {_flops(chip.bfloat16_flops)} in bfloat16" if chip else ""


def _squarest(count: int) -> tuple[int, int]:
    """(height, width) of the squarest grid of exactly `count` PEs, at most as high as wide."""
    height = max(side for side in range(1, int(count**0.5) + 1) if count % side == 0)
    return height, count // height


def _wafer_row(machine: Machine) -> list[str]:
    return [
        machine.name,
        f"{machine.usable_height}x{machine.usable_width}",
        f"{machine.sram_bytes // KIB} KiB",
        f"{machine.usable_pes * machine.sram_bytes / GB:.1f} GB",
        f"{machine.clock_hz / 1e9:.2f} GHz",
        _flops(machine.peak_flops("float32")),
        _flops(machine.peak_flops("bfloat16")),
    ]


def _chip_row(chip: Accelerator) -> list[str]:
    return [
        chip.name,
        f"{chip.memory_bytes // GB} GB",
        f"{chip.memory_bytes_per_second / TERA:.2f} TB/s",
        _flops(chip.float32_flops) if chip.float32_flops else "-",
        _flops(chip.bfloat16_flops),
    ]


def _flops(value: float) -> str:
    return f"{value / TERA:.0f} TFLOP/s" if value < 1e15 else f"{value / 1e15:.2f} PFLOP/s"


def _columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return ["  ".join(cells) for cells in aligned]
