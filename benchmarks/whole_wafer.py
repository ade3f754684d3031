"""This file is products and heat on every PE of a wafer, virtually: how long one device takes."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness, plain_stencil


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeWaferOptions:
    """Times a matrix product by `mesh`, a GEMV and heat on a virtual wafer, PE by PE, exactly."""

    side: int = 720
    """Rows and columns of PEs."""
    matrix: int = 1440
    """Rows and columns of the matrices of the product."""
    vector: int = 8192
    """Rows and columns of the matrix of the GEMV."""
    heat: tuple[int, int, int] = (750, 994, 64)
    """PEs along y and x and cells in each one's column, of a field of heat."""
    steps: int = 10
    """How many the heat takes."""
    only_heat: bool = False
    """Leave the products out."""
    rounds: int = 3
    """How often each is timed."""
    json: pathlib.Path | None = None
    """Where to write the results."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each product; the peer is the same product without a wafer."""
    options = tyro.cli(WholeWaferOptions, prog="python -m benchmarks whole_wafer", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    products = () if options.only_heat else ((options.matrix, False), (options.vector, True))
    for size, vector in products:
        what = "GEMV" if vector else "matmul by mesh"
        title = f"{what}, {size} x {size} on {options.side} x {options.side} virtual PEs, float32"
        candidates, notes = _candidates(options.side, size, vector)
        results = harness.compare(candidates, "one device", rounds=options.rounds, notes=notes)
        harness.show(title, results)
        tables[title] = results
    title = f"5-point heat, {options.steps} steps on {'x'.join(map(str, options.heat))} virtual PEs"
    tables[title] = harness.compare(_heat(options), "padded", rounds=options.rounds)
    harness.show(title, tables[title])
    if options.json:
        harness.dump(options.json, tables)


def heat_on(wafer: Any, steps: int) -> Callable:
    """Steps of periodic heat on a wafer, one cell of each PE's column after the other."""
    import wsekern as wk

    return functools.partial(
        wk.stencil,
        update=plain_stencil.five_points,
        radius=1,
        boundary="periodic",
        corners=False,
        steps=steps,
        wafer=wafer,
    )


def _heat(options: WholeWaferOptions):
    import jax

    import wsekern as wk

    rows, columns, _ = options.heat
    u = jax.random.normal(jax.random.key(0), options.heat)
    steps = options.steps
    ours = heat_on(wk.Wafer.virtual(wk.WSE2, rows, columns), steps)
    padded = functools.partial(plain_stencil.padded, name="5-point", steps=steps, unrolled=1)
    rolled = functools.partial(plain_stencil.rolled, name="5-point", steps=steps)
    plain: dict[str, Callable] = {"padded": padded, "rolled": rolled, "virtual wafer": ours}
    return {name: harness.compile_program(run, u) for name, run in plain.items()}


def _candidates(side: int, size: int, vector: bool):
    import jax
    import jax.numpy as jnp
    import numpy as np

    import wsekern as wk

    wafer = wk.Wafer.virtual(wk.WSE2, side, side)
    keys = jax.random.split(jax.random.key(0))
    b = jax.random.normal(keys[1], (size, size))
    a = jax.random.normal(keys[0], (size,) if vector else (size, size))

    def on_wafer(a, b):
        if vector:
            return wk.gemv(a, b, wafer=wafer)
        return wk.matmul(a, b, algorithm="mesh", wafer=wafer)

    candidates = {
        "one device": harness.compile_program(jnp.matmul, a, b),
        "virtual wafer": harness.compile_program(on_wafer, a, b),
    }
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    error = np.abs(np.asarray(candidates["virtual wafer"]()) - exact).max()
    return candidates, {"virtual wafer": f"largest error {error:.1e}"}
