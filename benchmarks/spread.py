"""A virtual wafer on one device against the same wafer spread over several devices.

Cannon's matrix product and steps of heat run in turn on both; the ratio is to one device. The notes
have the processor time, since emulated devices share the cores. Command: `python -m benchmarks
spread`
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness
from benchmarks.whole_wafer import heat_on


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpreadOptions:
    """Time Cannon's product and heat on virtual PEs, on one device and in blocks on several."""

    side: int = 360
    """Rows, and columns, of PEs for the product."""
    matrix: int = 720
    """Rows, and columns, of the matrices."""
    heat: tuple[int, int, int] = (750, 994, 16)
    """PEs along y, PEs along x, and cells in a PE's column, for the heat."""
    steps: int = 10
    """Time steps of the heat."""
    devices: tuple[int, int] = (2, 1)
    """Rows and columns of devices."""
    rounds: int = 5
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each program; the baseline is the wafer on one device."""
    options = tyro.cli(SpreadOptions, prog="python -m benchmarks spread", args=argv)
    harness.start(options.devices[0] * options.devices[1])
    harness.show_environment()
    grid = "x".join(map(str, options.heat))
    programs = {
        f"Cannon, {options.matrix}^2 on {options.side} x {options.side} PEs": _product(options),
        f"5-point heat, {options.steps} steps on {grid} PEs": _heat(options),
    }
    tables = {}
    for title, candidates in programs.items():
        notes = {name: _processor_time(run) for name, run in candidates.items()}
        tables[title] = harness.compare(
            candidates, "one device", rounds=options.rounds, notes=notes
        )
        harness.show(title, tables[title])
    if options.json:
        harness.dump(options.json, tables)


def _wafers(options: SpreadOptions, height: int, width: int):
    import wsekern as wk

    spread = wk.Wafer.virtual(wk.WSE2, height, width, devices=options.devices)
    down, across = options.devices
    name = f"{down} x {across} devices"
    return {"one device": wk.Wafer.virtual(wk.WSE2, height, width), name: spread}


def _product(options: SpreadOptions):
    import jax

    import wsekern as wk

    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (options.matrix, options.matrix)) for key in keys)
    candidates = {}
    for name, wafer in _wafers(options, options.side, options.side).items():
        product = functools.partial(wk.matmul, algorithm="cannon", wafer=wafer)
        candidates[name] = harness.compile_program(product, wafer.shard(a), wafer.shard(b))
    return candidates


def _heat(options: SpreadOptions):
    import jax

    rows, columns, _ = options.heat
    u = jax.random.normal(jax.random.key(0), options.heat)
    candidates = {}
    for name, wafer in _wafers(options, rows, columns).items():
        steps = heat_on(wafer, options.steps)
        candidates[name] = harness.compile_program(steps, wafer.shard(u))
    return candidates


def _processor_time(run: Callable[[], Any]) -> str:
    """Processor time of one run over all cores, which the emulated devices share."""
    import jax

    begun = time.process_time()
    jax.block_until_ready(run())
    return f"{time.process_time() - begun:.2f} s of processor time"
