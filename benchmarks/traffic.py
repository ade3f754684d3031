"""Words that a PE receives in every kernel on p x p PEs, read off its trace, beside the formula.

Nothing runs and nothing is timed: each kernel is traced for a wafer of WSE-2 PEs. Where the trace
differs from the formula of the kernel's docstring, the table shows both.
Command: `python -m benchmarks traffic`
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import tyro
from rich.table import Table

from benchmarks import harness

# Words of an operand on one PE: of a matrix, and of queries, keys or values.
TILE = 8 * 8
HEAD_TILE = 4 * 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrafficOptions:
    """Trace each kernel for a wafer of WSE-2 PEs; nothing runs and nothing is timed."""

    sides: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Values of p: rows, and columns, of PEs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A program on p x p PEs, and its docstring's formulas for one PE."""

    program: Callable[..., Any]
    operands: Callable[[int], tuple]  # shapes, for p
    words: Callable[[int], float]
    steps: Callable[[int], int]


def main(argv: list[str] | None = None) -> None:
    """Prints words and steps by p, and the formula's figures where they differ."""
    options = tyro.cli(TrafficOptions, prog="python -m benchmarks traffic", args=argv)
    harness.start(1)
    table = Table(title="words a PE receives / steps that wait for one another", box=None)
    table.add_column("program")
    for p in options.sides:
        table.add_column(f"p = {p}", justify="right")
    for name, case in cases().items():
        table.add_row(name, *(_cell(case, p) for p in options.sides))
    harness.console().print(table)


def _cell(case: Case, p: int) -> str:
    words, steps = read(case, p)
    formula = case.words(p), case.steps(p)
    cell = f"{words:,.0f} / {steps}"
    return cell if (words, steps) == formula else f"{cell}, not {formula[0]:,.0f} / {formula[1]}"


def read(case: Case, p: int) -> tuple[float, int]:
    """Words and steps of `case` on p x p PEs, read off its trace."""
    import wsekern as wk

    traffic = wk.traffic(case.program, *case.operands(p), wafer=wk.Wafer.abstract(wk.WSE2, p, p))
    return traffic.words, traffic.steps


def cases() -> dict[str, Case]:
    """Every kernel that sends, by name."""
    return {**_products(), **_attentions(), **_decoding()}


def _products() -> dict[str, Case]:
    import jax

    import wsekern as wk

    def matrices(p: int) -> tuple:
        return (jax.ShapeDtypeStruct((8 * p, 8 * p), "float32"),) * 2

    def case(algorithm, words, steps):
        program = functools.partial(wk.matmul, algorithm=algorithm)
        return Case(program=program, operands=matrices, words=words, steps=steps)

    return {
        "matmul, allgather": case("allgather", lambda p: 2 * (p - 1) * TILE, lambda p: 1),
        "matmul, summa": case("summa", lambda p: 2 * p * TILE, lambda p: 1),
        "matmul, collective": case(
            "collective", lambda p: 2 * (p - 1) * TILE, lambda p: max(p - 1, 1)
        ),
        "matmul, stationary": case("stationary", lambda p: (3 * p - 2) * TILE, lambda p: 3),
        "gemv": Case(
            program=wk.gemv,
            operands=lambda p: (jax.ShapeDtypeStruct((8 * p,), "float32"), matrices(p)[1]),
            words=lambda p: _all_reduce_traffic(p, 8).words,
            steps=lambda p: _all_reduce_traffic(p, 8).steps,
        ),
        "matmul, cannon": case("cannon", lambda p: 2 * p * TILE, lambda p: p),
        "matmul, mesh_gemm": case("mesh_gemm", lambda p: 2 * p * TILE, lambda p: p),
    }


def _attentions() -> dict[str, Case]:
    import jax

    import wsekern as wk

    def heads(p: int) -> tuple:
        return (jax.ShapeDtypeStruct((1, 4 * p, p, 16), "float32"),) * 3

    def case(algorithm, words, steps, backward=False, **options):
        forward = functools.partial(wk.attention, algorithm=algorithm, **options)
        program = _gradients_alone(forward) if backward else forward
        operands = heads if not backward else lambda p: (heads(p), heads(p)[0])
        return Case(
            program=program,
            operands=operands,
            words=lambda p: words(p) * HEAD_TILE,
            steps=steps,
        )

    def zigzag(moved):
        # Half of each tile of queries, keys and values goes out, and half of the result comes back.
        return lambda p: moved(p) + 2

    return {
        "attention, ring": case("ring", lambda p: 2 * (p - 1), lambda p: p - 1),
        "attention, ring, gradient": case(
            "ring", lambda p: 2 * (p - 1) + 2 * (2 * p - 1), lambda p: 2 * p - 1, backward=True
        ),
        "attention, zig-zag ring": case(
            "ring", zigzag(lambda p: 2 * (p - 1)), lambda p: p + 1, causal=True
        ),
        "attention, window": case("ring", lambda p: 2, lambda p: 1, causal=True, window=5),
        "attention, allgather": case("allgather", lambda p: 2 * (p - 1), lambda p: 1),
        "attention, allgather, gradient": case(
            "allgather", lambda p: 6 * (p - 1), lambda p: 2, backward=True
        ),
    }


def _gradients_alone(forward: Callable) -> Callable:
    """The gradients of `forward`, and the parts of `forward` that they need."""
    import jax

    def gradients(operands, dout):
        return jax.vjp(forward, *operands)[1](dout)

    return gradients


def _decoding() -> dict[str, Case]:
    import jax

    import wsekern as wk

    def case(step, length, words, steps):
        def program(x):
            p = x.shape[2]
            sizes = {"batch": 1, "capacity": 4 * p, "kv_heads": p, "head_size": 16}
            return step(wk.KVCache.empty(**sizes), x)

        def tokens(p: int) -> tuple:
            return (jax.ShapeDtypeStruct((1, length(p), p, 16), "float32"),)

        return Case(program=program, operands=tokens, words=words, steps=steps)

    return {
        "cache, append": case(
            lambda cache, x: cache.append(x, x), lambda p: 1, lambda p: 2 * 16, lambda p: 1
        ),
        "cache, fill": case(
            lambda cache, x: cache.fill(x, x),
            lambda p: 4 * p,
            lambda p: 2 * (p - 1) * HEAD_TILE,
            lambda p: p - 1,
        ),
        "decode_attention": case(
            lambda cache, x: wk.decode_attention(x, cache),
            lambda p: 1,
            lambda p: _all_reduce_traffic(p, 1).words + _all_reduce_traffic(p, 17).words,
            lambda p: _all_reduce_traffic(p, 1).steps + _all_reduce_traffic(p, 17).steps,
        ),
    }


def _all_reduce_traffic(p: int, words: int) -> Any:
    """The traffic of one PE in the all-reduce along one axis that is cheapest on WSE-2."""
    import wsekern as wk
    from wsekern import fabric

    algorithm, _ = fabric.cheapest([p], words, wk.WSE2)
    return fabric.received(algorithm, [p], words)
