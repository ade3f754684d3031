"""Matrix products and heat on every PE of a virtual wafer, on one device, against plain jnp.

Every PE's program runs, vectorized over the PEs. Candidates run in turn; the ratio is to the same
product, or the same steps, without a wafer. Command: `python -m benchmarks whole_wafer`
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness, plain_stencil


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeWaferOptions:
    """Time a matrix product (MeshGEMM), a GEMV and heat on every PE of a virtual wafer."""

    side: int = 720
    """Rows, and columns, of PEs for the products."""
    matrix: int = 1440
    """Rows, and columns, of the matrices of the product."""
    vector: int = 8192
    """Rows, and columns, of the matrix of the GEMV."""
    heat: tuple[int, int, int] = (750, 994, 64)
    """PEs along y, PEs along x, and cells in a PE's column, for the heat."""
    steps: int = 10
    """Time steps of the heat."""
    only_heat: bool = False
    """Leave the products out."""
    rounds: int = 3
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each product, and one for the heat."""
    options = tyro.cli(WholeWaferOptions, prog="python -m benchmarks whole_wafer", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    products = () if options.only_heat else ((options.matrix, False), (options.vector, True))
    for size, vector in products:
        product = "GEMV" if vector else "matmul by mesh"
        title = (
            f"{product}, {size} x {size} on {options.side} x {options.side} virtual PEs, float32"
        )
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
    """A function that takes `steps` steps of periodic heat, a column of cells on each PE."""
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
    padded = functools.partial(plain_stencil.step_by_pad, name="5-point", steps=steps, unrolled=1)
    rolled = functools.partial(plain_stencil.step_by_roll, name="5-point", steps=steps)
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
        return wk.matmul(a, b, algorithm="mesh_gemm", wafer=wafer)

    candidates = {
        "one device": harness.compile_program(jnp.matmul, a, b),
        "virtual wafer": harness.compile_program(on_wafer, a, b),
    }
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    error = np.abs(np.asarray(candidates["virtual wafer"]()) - exact).max()
    return candidates, {"virtual wafer": f"largest error {error:.1e}"}
