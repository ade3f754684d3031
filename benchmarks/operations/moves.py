"""The moves and reductions of the fabric, each as a program of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks.operations.case import OperandShapes, OperationCase
from wsekern import fabric
from wsekern.wafer.wafer import Wafer

_SIDE = 512
_TILED = P(("wafer", "y"), "x")


def cases(operands: OperandShapes) -> Iterator[OperationCase]:
    """All of them."""
    x = operands.floats(_SIDE, _SIDE, spec=_TILED)

    def case(name: str, move: Callable[[jax.Array], jax.Array], **options: Any) -> OperationCase:
        def run(x: Any) -> jax.Array:
            kernel = operands.wafer.map(
                lambda tile: fabric.varying(move(tile)), in_specs=_TILED, out_specs=_TILED
            )
            return kernel(x)

        return OperationCase(f"fabric.{name}", run, (x,), **options)

    yield from _moves(case)
    yield from _reductions(case)


def _is_square(wafer: Wafer) -> bool:
    return wafer.height == wafer.width


def _moves(case: Callable[..., OperationCase]) -> Iterator[OperationCase]:
    along = ("y", "x")
    yield case("shift", lambda t: fabric.shift(t, "x"))
    yield case("shift, not periodic", lambda t: fabric.shift(t, "y", periodic=False, fill=1.0))
    yield case("shift, folded", lambda t: fabric.shift(t, "x", ring="folded"))
    yield case("skew", lambda t: fabric.skew(t, "x", "y"))
    yield case("skew, folded", lambda t: fabric.skew(t, "x", "y", ring="folded"))
    yield case("route", lambda t: fabric.route(t, "x", [(0, 1), (1, 0)]))
    yield case("transpose", fabric.transpose, needs=_is_square)
    yield case("broadcast", lambda t: fabric.broadcast(t, "x"))
    yield case("broadcast along both", lambda t: fabric.broadcast(t, along, root=1))
    yield case("flood", lambda t: fabric.flood(_only_first(t, "x"), "x"))
    yield case("scatter", lambda t: fabric.scatter(t, "x"))
    yield case("gather", lambda t: fabric.gather(t, "x"))
    yield case("all_gather", lambda t: fabric.all_gather(t, "x"))
    yield case("all_gather along both", lambda t: fabric.all_gather(t, along, 1))
    yield case("ring_all_gather", lambda t: fabric.ring_all_gather(t, "x"))
    yield case("reduce_scatter", lambda t: fabric.reduce_scatter(t, "y"))
    yield case("all_to_all", lambda t: fabric.all_to_all(t, "x", 0, 1))
    yield case("varying", fabric.varying)
    yield case("axis_index, fabric.axis_size, fabric.ring_index", _number)


def _only_first(tile: jax.Array, along: str) -> jax.Array:
    return jnp.where(fabric.axis_index(along) == 0, tile, 0)


def _number(tile: jax.Array) -> jax.Array:
    place = fabric.axis_index(("y", "x")) * fabric.axis_size("x") + fabric.ring_index("y", "folded")
    return tile * place.astype(tile.dtype)


def _reductions(case: Callable[..., OperationCase]) -> Iterator[OperationCase]:
    for algorithm in get_args(fabric.Algorithm):
        along: Any = ("y", "x") if algorithm == "snake" else "x"
        options = {"along": along, "algorithm": algorithm}
        yield case(f"all_reduce, {algorithm}", functools.partial(fabric.all_reduce, **options))
        if algorithm != "ring":  # it has no root
            yield case(f"reduce, {algorithm}", functools.partial(fabric.reduce, **options))
    for op in ("max", "min", "mean"):
        reduced = functools.partial(fabric.all_reduce, along=("y", "x"), op=op)
        yield case(f"all_reduce, {op}", reduced, has_gradient=op == "mean")
