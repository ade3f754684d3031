"""What an operation costs above the plain call where no wafer is in use, outside jit.

Operands are so small (8 x 8) that the call itself takes the time. Candidates run in turn; the ratio
is to the plain jax.numpy call. Command: `python -m benchmarks overhead`
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import tyro

from benchmarks import harness


@dataclasses.dataclass(frozen=True, kw_only=True)
class OverheadOptions:
    """Time calls outside jit, on operands so small that only the call itself takes time."""

    rounds: int = 21
    """How often each candidate is timed."""
    json: pathlib.Path | None = None
    """Write the results to this file, as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Prints one table for each operation."""
    options = tyro.cli(OverheadOptions, prog="python -m benchmarks overhead", args=argv)
    harness.start(1)
    harness.show_environment()
    tables = {}
    for title, candidates in _cases().items():
        results = harness.compare(candidates, "plain", rounds=options.rounds)
        seconds = results[0].seconds
        columns = {"more, us": lambda r, s=seconds: f"{(r.seconds - s) * 1e6:+.1f}"}
        harness.show(title, results, columns)
        tables[title] = results
    if options.json:
        harness.dump(options.json, tables)


def _cases() -> dict[str, dict[str, Callable[[], Any]]]:
    import jax
    import jax.numpy as jnp

    import wsekern as wk

    one = wk.Wafer.devices(1, 1)
    a, row = jnp.ones((8, 8)), jnp.ones(8)
    q = jnp.ones((1, 8, 2, 8))
    tokens = jnp.zeros(8, jnp.int32)

    def plain_norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    pairs: dict[str, tuple[Callable, Callable, tuple]] = {
        "matmul": (jnp.matmul, wk.matmul, (a, a)),
        "attention": (jax.nn.dot_product_attention, wk.attention, (q, q, q)),
        "rms_norm": (plain_norm, wk.rms_norm, (a, row)),
        "embedding": (lambda t, table: jnp.take(table, t, axis=0), wk.embedding, (tokens, a)),
    }
    return {name: _candidates(*pair, one) for name, pair in pairs.items()}


def _candidates(plain, operation, operands, one_pe) -> dict[str, Callable[[], Any]]:
    import jax

    jitted = jax.jit(plain), jax.jit(operation)
    return {
        "plain": lambda: plain(*operands),
        "no wafer": lambda: operation(*operands),
        "one PE": lambda: operation(*operands, wafer=one_pe),
        "plain, jitted": lambda: jitted[0](*operands),
        "no wafer, jitted": lambda: jitted[1](*operands),
    }
