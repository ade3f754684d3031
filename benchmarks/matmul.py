"""Matrix products on a grid: every algorithm against jit with shardings alone, and one device.

Operands and result are square and laid out P("y", "x"). All candidates are compiled first, then run
in turn. The ratio is to `jnp.matmul` under `jax.jit` with the same shardings.
Command: `python -m benchmarks matmul --grid 2x4 --sizes 1024`
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Literal

import tyro

from benchmarks import harness
from wsekern.wafer.launch import parse_height_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulOptions:
    """Time products of square matrices; operands and result are laid out P("y", "x")."""

    grid: tuple[str, ...] = ("2x2", "2x4", "4x4")
    """Grids of emulated devices, HEIGHTxWIDTH."""
    sizes: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Rows and columns of the matrices."""
    backward: bool = False
    """Include the gradients of both operands."""
    form: Literal["nn", "nt", "tn"] = "nn"
    """`a @ b`, `a @ b^T` or `a^T @ b`."""
    dtype: str = "float32"
    """Dtype of the operands."""
    int8: bool = False
    """Make `b` int8 with a scale for each column; forward only."""
    algorithms: tuple[str, ...] = ()
    """Algorithms to time beside `auto`. Default: all that the grid allows."""
    rounds: int = 11
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each grid and size."""
    options = tyro.cli(MatmulOptions, prog="python -m benchmarks matmul", args=argv)
    grids = [parse_height_width(text) for text in options.grid]
    harness.start(max(math.prod(grid) for grid in grids))
    harness.show_environment()
    tables = {}
    for grid in grids:
        for size in options.sizes:
            passes = "forward and backward" if options.backward else "forward"
            kind = f"{options.dtype} x int8" if options.int8 else options.dtype
            title = f"{size} x {size} on {grid[0]}x{grid[1]}, {options.form}, {kind}, {passes}"
            candidates, notes = _candidates(grid, size, options)
            results = harness.compare(candidates, "jit", rounds=options.rounds, notes=notes)
            (alone,) = (r.ratio for r in results if r.name == "one device")
            to_one = {"to one device": lambda r, alone=alone: f"{r.ratio / alone:.2f}"}
            harness.show(title, results, to_one)
            tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _candidates(grid, size, options):
    import jax
    import jax.numpy as jnp

    import wsekern as wk
    from wsekern.kernels.matmul import choice
    from wsekern.wafer.wafer import TILED

    wafer = wk.Wafer.devices(*grid)
    keys = jax.random.split(jax.random.key(0), 3)
    whole = [jax.random.normal(key, (size, size), options.dtype) for key in keys]
    scales = None
    if options.int8:
        whole[1] = jnp.clip(jnp.round(whole[1] * 32), -127, 127).astype(jnp.int8)
        scales = jnp.full((size,), 1 / 32)
    tiled = [wafer.shard(x) for x in whole]
    transposed = {"transpose_a": options.form == "tn", "transpose_b": options.form == "nt"}

    def ours(a, b, algorithm="auto", wafer=wafer):
        return wk.matmul(a, b, scales=scales, algorithm=algorithm, wafer=wafer, **transposed)

    # On one PE the product is the plain program.
    plain = functools.partial(ours, wafer=wk.Wafer.devices(1, 1))

    def case(product, operands, **layout):
        function, used = _function_to_time(product, options.backward), 3 if options.backward else 2
        return harness.compile_program(function, *operands[:used], **layout)

    # What a user has without the library: the same layouts, and XLA decides what moves.
    candidates = {"jit": case(plain, tiled, out_shardings=wafer.sharding(TILED))}
    auto = wk.explain_matmul(*whole[:2], wafer=wafer, **transposed)
    notes = {
        "jit": "jax.jit, same shardings",
        "one device": "jnp.matmul, same cores",
        "auto": f"{auto.algorithm} {auto.candidates[auto.algorithm].note}".strip(),
    }
    for algorithm in (*(options.algorithms or choice.serving(wafer)), "auto"):
        candidates[algorithm] = case(functools.partial(ours, algorithm=algorithm), tiled)
    candidates["one device"] = case(plain, whole)
    return candidates, notes


def _function_to_time(product: Callable, backward: bool) -> Callable:
    if not backward:
        return product
    import jax

    def both(a, b, dc):
        c, gradients = jax.vjp(product, a, b)
        return c, gradients(dc)

    return both
