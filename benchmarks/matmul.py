"""This file is matrix products: every algorithm against jit with shardings alone and one device."""

import dataclasses
import math
import pathlib
from collections.abc import Callable

import tyro

from benchmarks import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times `a @ b` of square float matrices, both operands and the result laid out P("y", "x")."""

    grid: tuple[str, ...] = ("2x2", "2x4", "4x4")
    """Grids of emulated devices, HEIGHTxWIDTH."""
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Rows and columns of the matrices."""
    backward: bool = False
    """Time the product together with the gradients of both operands."""
    dtype: str = "float32"
    """Of the operands."""
    rounds: int = 11
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Where to write the results."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each grid and size."""
    options = tyro.cli(Options, prog="python -m benchmarks matmul", args=argv)
    grids = [harness.parse_grid(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for size in options.sizes:
            what = "forward and backward" if options.backward else "forward"
            title = f"{size} x {size} on {grid[0]}x{grid[1]}, {options.dtype}, {what}"
            candidates, notes = _candidates(grid, size, options)
            results = harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)
            harness.show(title, results)
            tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _candidates(grid, size, options):
    import jax
    import jax.numpy as jnp

    import wsekern as wk
    from wsekern.kernels import matmul
    from wsekern.wafer import TILED

    wafer = wk.Wafer.devices(*grid)
    keys = jax.random.split(jax.random.key(0), 3)
    whole = [jax.random.normal(key, (size, size), options.dtype) for key in keys]
    tiled = [wafer.shard(x) for x in whole]
    sharding = wafer.sharding(TILED)

    def case(product, operands, **layout):
        function, used = _timed(product, options.backward), 3 if options.backward else 2
        return harness.compiled(function, *operands[:used], **layout)

    # What a user has without the library: the same layouts, and XLA finds the moves.
    candidates = {"jit": case(jnp.matmul, tiled, out_shardings=sharding)}
    notes = {"jit": "jax.jit, same shardings", "one device": "jnp.matmul, same cores"}
    for algorithm in (*matmul.algorithms(wafer), "auto"):
        candidates[algorithm] = case(
            lambda a, b, algorithm=algorithm: wk.matmul(a, b, algorithm=algorithm, wafer=wafer),
            tiled,
        )
    candidates["one device"] = case(jnp.matmul, whole)
    return candidates, notes


def _timed(product: Callable, backward: bool) -> Callable:
    if not backward:
        return product
    import jax

    def both(a, b, dc):
        c, gradients = jax.vjp(product, a, b)
        return c, gradients(dc)

    return both
