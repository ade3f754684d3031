"""Stencils on a grid: many steps, and one halo exchange, against jnp.roll under jit and one device.

Fields are periodic and float32. Candidates take the same steps and run in turn; the ratio is to
`jnp.roll` under `jax.jit` with the same shardings. Command: `python -m benchmarks stencil --grid
2x4`
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness, plain_stencil, public_halo
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class StencilOptions:
    """Time steps of periodic float32 stencils, and one halo exchange."""

    grid: tuple[str, ...] = ("2x4", "4x4")
    """Grids of emulated devices, HEIGHTxWIDTH."""
    stencils: tuple[str, ...] = ("5-point", "9-point", "25-point")
    """Which stencils to time."""
    size: int = 2048
    """Rows, and columns, of the field for the 5-point and the 9-point stencil."""
    volume: tuple[int, int, int] = (256, 256, 128)
    """Sizes of the field for the 25-point stencil; the last dimension is not split."""
    steps: int = 80
    """Steps in one call; the 25-point stencil takes a tenth of them."""
    depths: tuple[int, ...] = (1, 4, 8)
    """Steps between exchanges to time, besides the automatic choice."""
    exchange: bool = True
    """Time a single exchange too."""
    rounds: int = 7
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each grid and stencil."""
    options = tyro.cli(StencilOptions, prog="python -m benchmarks stencil", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for name in options.stencils:
            shape = options.volume if name == "25-point" else (options.size,) * 2
            steps = max(1, options.steps // 10) if name == "25-point" else options.steps
            title = f"{name}, {'x'.join(map(str, shape))}, {steps} steps on {grid[0]}x{grid[1]}"
            tables[title] = _steps_table(grid, name, shape, steps, options)
            harness.show(title, tables[title], _columns(tables[title], steps))
        for width in (1, 4) if options.exchange else ():
            title = f"one exchange, {options.size}^2, width {width} on {grid[0]}x{grid[1]}"
            tables[title] = _exchange_table(grid, width, options)
            harness.show(title, tables[title])
    if options.json:
        harness.dump(options.json, tables)


def _columns(results, steps) -> dict[str, Callable[[harness.Timing], str]]:
    best = min(r.seconds for r in results if r.name.startswith("one device"))
    return {
        "us a step": lambda r: f"{r.seconds / steps * 1e6:.0f}",
        "over one device": lambda r: f"{r.seconds / best:.2f}",
    }


def _steps_table(grid, name, shape, steps, options) -> list[harness.Timing]:
    import jax

    import wsekern as wk
    from wsekern.wafer.wafer import TILED

    wafer = wk.Wafer.devices(*grid)
    whole = jax.random.normal(jax.random.key(0), shape)
    tiled = wafer.shard(whole, TILED)

    def ours(depth):
        run = functools.partial(
            wk.stencil,
            update=plain_stencil.UPDATES[name],
            radius=plain_stencil.RADII[name],
            boundary="periodic",
            steps=steps,
            depth=depth,
            wafer=wafer,
        )
        return harness.compile_program(run, tiled)

    rolled = functools.partial(plain_stencil.step_by_roll, name=name, steps=steps)
    layout = wafer.sharding(TILED)
    candidates: dict[str, Callable[[], Any]] = {
        "jit": harness.compile_program(rolled, tiled, out_shardings=layout),
        "stencil": ours(None),
    }
    for depth in options.depths:
        candidates[f"stencil, depth {depth}"] = ours(depth)
    for depth in options.depths:
        run = functools.partial(plain_stencil.step_by_pad, name=name, steps=steps, unrolled=depth)
        candidates[f"one device, {depth} unrolled"] = harness.compile_program(run, whole)
        peer = (
            None if name == "25-point" else public_halo.step_by_exchange(wafer, name, steps, depth)
        )
        if peer is not None:
            candidates[f"jaxdecomp, depth {depth}"] = harness.compile_program(peer, tiled)
    notes = {"jit": "jnp.roll under jax.jit, same shardings"}
    return harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)


def _exchange_table(grid, width, options) -> list[harness.Timing]:
    import jax

    import wsekern as wk
    from wsekern.wafer.wafer import TILED

    wafer = wk.Wafer.devices(*grid)
    u = wafer.shard(jax.random.normal(jax.random.key(0), (options.size,) * 2), TILED)
    ours = functools.partial(wk.halo_exchange, width=width, boundary="periodic", wafer=wafer)
    candidates = {
        "by hand": harness.compile_program(plain_stencil.exchange_by_hand(wafer, width), u),
        "halo_exchange": harness.compile_program(ours, u),
    }
    peer = public_halo.exchange(wafer, width)
    if peer is not None:
        candidates["jaxdecomp"] = harness.compile_program(peer, u)
    notes = {"by hand": "shard_map, jnp.pad, ppermute and writes in place"}
    return harness.compare(candidates, "by hand", rounds=3 * options.rounds, notes=notes)
