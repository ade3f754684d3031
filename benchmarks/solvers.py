"""Solvers of Poisson's equation on a grid against those of jax.scipy and scipy.sparse.

Each candidate solves for the same noise to the same tolerance, in float32; a note gives its
iterations and its true residual. Candidates run in turn; the ratio is to jax.scipy under `jax.jit`
with the same sharding. Command: `python -m benchmarks solvers`
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness, plain_poisson
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolversOptions:
    """Time whole solutions, in float32, for a right side of noise."""

    grid: tuple[str, ...] = ("2x4",)
    """Grids of emulated devices, HEIGHTxWIDTH."""
    size: int = 512
    """Rows and columns of the field."""
    wind: float = 0.3
    """Wind added to the Laplacian for BiCGStab; CG and multigrid are timed without."""
    tolerance: float = 1e-4
    """Residual to stop at, as a share of the right side's norm."""
    rounds: int = 5
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each grid and kind of operator."""
    options = tyro.cli(SolversOptions, prog="python -m benchmarks solvers", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(height * width for height, width in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for wind in (0.0, options.wind):
            kind = f"with a wind of {wind}" if wind else "symmetric"
            title = f"{kind}, {options.size}^2 on {grid[0]}x{grid[1]}, to {options.tolerance}"
            tables[title] = _table(grid, wind, options)
            harness.show(title, tables[title])
    if options.json:
        harness.dump(options.json, tables)


def _table(grid, wind, options) -> list[harness.Timing]:
    import jax

    import wsekern as wk
    from wsekern.wafer.wafer import TILED

    wafer = wk.Wafer.devices(*grid)
    whole = jax.random.normal(jax.random.key(0), (options.size,) * 2)
    tiled = wafer.shard(whole, TILED)
    theirs = functools.partial(plain_poisson.solve, wind=wind, tolerance=options.tolerance)
    candidates: dict[str, Callable[[], Any]] = {"jit": harness.compile_program(theirs, tiled)}
    for name, solver in _ours(wind, options.tolerance).items():
        candidates[name] = harness.compile_program(functools.partial(solver, wafer=wafer), tiled)
    candidates["jax.scipy, one device"] = harness.compile_program(theirs, whole)
    for name, solver in _ours(wind, options.tolerance).items():
        candidates[f"{name}, one device"] = harness.compile_program(
            functools.partial(solver, wafer=None), whole
        )
    candidates["scipy.sparse"] = plain_poisson.by_scipy(whole, wind, options.tolerance)
    notes = {name: _note(name, run(), whole, wind, options) for name, run in candidates.items()}
    notes["jit"] += "; jax.scipy under jit, b with the same sharding"
    return harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)


def _ours(wind, tolerance) -> dict[str, Callable[..., Any]]:
    import wsekern as wk

    most = {"tolerance": tolerance, "max_iterations": 10_000}

    def at(level, wafer):
        return functools.partial(
            wk.stencil,
            update=functools.partial(_update, wind=wind, level=level),
            radius=1,
            boundary=lambda near: -near,
            wafer=wafer,
        )

    def diagonal_at(level):
        return 4 / level**2

    def cycles(b, wafer):
        grids = functools.partial(at, wafer=wafer)
        return wk.multigrid(grids, b, diagonal_at=diagonal_at, tolerance=tolerance)

    def cg_by_a_cycle(b, wafer):
        grids = functools.partial(at, wafer=wafer)
        cycle = wk.v_cycle(grids, b.shape, diagonal_at=diagonal_at)
        return wk.cg(at(1, wafer), b, preconditioner=cycle, **most)

    if wind:
        return {"bicgstab": lambda b, wafer: wk.bicgstab(at(1, wafer), b, **most)}
    return {
        "cg": lambda b, wafer: wk.cg(at(1, wafer), b, **most),
        "multigrid": cycles,
        "cg by a cycle": cg_by_a_cycle,
    }


def _update(u, *, wind, level):
    """Minus the Laplacian, plus a wind along y, of a tile with a halo of one cell."""
    down, up = u[2:, 1:-1], u[:-2, 1:-1]
    flow = 4 * u[1:-1, 1:-1] - down - up - u[1:-1, 2:] - u[1:-1, :-2]
    return (flow + wind * (down - up) if wind else flow) / level**2


def _note(name, solution, b, wind, options) -> str:
    """The iterations, and the true residual in float64, as text."""
    if name == "jit" or name.startswith("jax.scipy"):
        iterations, x = plain_poisson.count_iterations(b, wind, options.tolerance), solution
    elif name == "scipy.sparse":
        iterations, x = solution
    else:
        iterations, x = int(solution.iterations), solution.x
    return f"{iterations} iterations, residual {plain_poisson.residual(x, b, wind):.1e}"
