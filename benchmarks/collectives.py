"""All-reduce algorithms: predicted cycles on a wafer, and times on emulated devices.

The first table has the cost model's cycles along a line of WSE-2 PEs. Then each algorithm runs in
turn along y of a grid of devices; the ratio is to XLA's own all-reduce.
Command: `python -m benchmarks collectives`
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import tyro
from rich.table import Table

from benchmarks import harness
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectivesOptions:
    """Predict all-reduces along a line of WSE-2 PEs, then time them along y on devices."""

    pes: tuple[int, ...] = (16, 64, 256, 512)
    """PEs in a line of the wafer."""
    words: tuple[int, ...] = (1, 64, 1024, 16384)
    """32-bit words in a PE's tile."""
    grid: tuple[str, ...] = ("8x1",)
    """Grids of emulated devices, HEIGHTxWIDTH."""
    rounds: int = 11
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints the predicted cycles, then a table for each grid and number of words."""
    options = tyro.cli(CollectivesOptions, prog="python -m benchmarks collectives", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    harness.console().print(_prediction_table(options))
    tables = {}
    for grid in grids:
        for words in options.words:
            title = f"all-reduce of {words} words a device along y on {grid[0]}x{grid[1]}"
            results = harness.compare(_candidates(grid, words), "xla", rounds=options.rounds)
            harness.show(title, results)
            tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _prediction_table(options: CollectivesOptions) -> Table:
    import wsekern as wk
    from wsekern import fabric
    from wsekern.fabric.reductions.choice import LINES

    names = [*LINES, "ring"]
    table = Table(
        title="predicted cycles of an all-reduce on WSE-2", title_justify="left", box=None
    )
    for heading in ("PEs", "words", *names, "auto"):
        table.add_column(heading, justify="right")
    for pes in options.pes:
        for words in options.words:
            cycles = [fabric.predicted_cycles(name, [pes], words, wk.WSE2) for name in names]
            best, _ = fabric.cheapest([pes], words, wk.WSE2)
            table.add_row(f"{pes}", f"{words}", *(f"{c:,.0f}" for c in cycles), best)
    return table


def _candidates(grid: tuple[int, int], words: int) -> Mapping[str, Callable[[], Any]]:
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from wsekern import fabric
    from wsekern.fabric.reductions.choice import LINES

    wafer, spec = wk.Wafer.devices(*grid), P(("y", "x"))
    x = wafer.shard(jnp.ones(wafer.size * words), spec)

    def case(algorithm):
        def kernel(tile):
            return fabric.all_reduce(tile, "y", algorithm=algorithm)

        return harness.compile_program(wafer.map(kernel, in_specs=spec, out_specs=spec), x)

    return {name: case(name) for name in ("xla", *LINES, "ring")}
