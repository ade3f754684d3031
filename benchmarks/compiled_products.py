"""Matrix products that are compiled for chips: squares, shapes of language models, algorithms.

Each comes as a title with its candidates, functions that give a function, its shapes and options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

Programs = Iterator[tuple[str, dict[str, Callable[[], Any]]]]
_SIDE = 8192  # of the matrices that every algorithm multiplies


class _Layer(NamedTuple):
    """`activation(a @ b * scales + bias)` as a layer of a language model has it."""

    title: str
    rows: int
    features: int
    outputs: tuple[int, ...]  # of one weight, or of several that share `a`
    activation: str | None = None
    biased: bool = False
    int8: bool = False


_LAYERS = (
    _Layer("8192 x 4096 x 16384, bias and gelu", 8192, 4096, (16384,), "gelu", biased=True),
    _Layer("8192 x 16384 x 4096", 8192, 16384, (4096,)),
    _Layer("8192 x 4096 x 16384 in int8, silu", 8192, 4096, (16384,), "silu", int8=True),
    _Layer("8192 x 3000 x 11000, bias and silu", 8192, 3000, (11000,), "silu", biased=True),
    _Layer("query, key and value, 8192 x 4096", 8192, 4096, (4096, 1024, 1024)),
    _Layer("gate and up, 16 x 4096 x 14336", 16, 4096, (14336, 14336)),
    _Layer("16 x 4096 x 16384 in int8, silu", 16, 4096, (16384,), "silu", int8=True),
    _Layer("1 x 4096 x 16384, bias and gelu", 1, 4096, (16384,), "gelu", biased=True),
)


def programs(wafer: Wafer, sides: tuple[int, ...]) -> Programs:
    """Squares and their gradients, then the layers."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk

    tiled = wafer.sharding(P("y", "x"))
    constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=tiled)

    def alone(a: jax.Array, b: jax.Array) -> jax.Array:
        return constrain(a @ b)

    def with_layouts(function: Callable) -> Callable:
        return lambda *operands: tuple(map(constrain, gradient(function)(*operands)))

    def candidate(function: Callable, count: int, side: int) -> Any:
        shape = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=tiled)
        return function, (shape,) * count, {}

    for side in sides:
        for title, of, count in (
            ("", lambda f: f, 2),
            (", gradient", gradient, 3),
            (", gradient with constrained layouts", with_layouts, 3),
        ):
            yield (
                f"product {side}^2{title}",
                {
                    name: functools.partial(candidate, of(f), count, side)
                    for name, f in (("jit alone", alone), ("wk.matmul", wk.matmul))
                },
            )
    for layer in _LAYERS:
        yield layer.title, _candidates(layer, wafer)


def algorithms(wafer: Wafer) -> Programs:
    """Each algorithm that serves the chips, beside jit alone."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk
    from wsekern.kernels.matmul import choice

    tiled = wafer.sharding(P("y", "x"))

    def candidate(function: Callable) -> Any:
        shape = jax.ShapeDtypeStruct((_SIDE, _SIDE), jnp.bfloat16, sharding=tiled)
        return function, (shape, shape), {"out_shardings": tiled}

    functions: dict[str, Callable] = {"jit alone": jnp.matmul}
    for name in choice.serving(wafer):
        functions[f"wk.matmul {name}"] = functools.partial(wk.matmul, algorithm=name)
    yield (
        f"product {_SIDE}^2 by each algorithm",
        {name: functools.partial(candidate, function) for name, function in functions.items()},
    )


def gradient(
    function: Callable[..., Any], numbers: tuple[int, ...] | None = None
) -> Callable[..., Any]:
    """The gradients of a function's operands, given that of its result as the last operand.

    Args:
      function: what to differentiate.
      numbers: of the operands that have a gradient; None for all.
    """
    import jax

    def run(*operands: Any) -> Any:
        given = list(operands[:-1])
        places = range(len(given)) if numbers is None else numbers

        def of_some(*some: Any) -> Any:
            for place, operand in zip(places, some, strict=True):
                given[place] = operand
            return function(*given)

        return jax.vjp(of_some, *(given[place] for place in places))[1](operands[-1])

    return run


def _candidates(layer: _Layer, wafer: Wafer) -> dict[str, Callable[[], Any]]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    import wsekern as wk

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        axes = ("y", "x") if len(sizes) == 2 else ("x",)
        split = [
            axis if size % wafer.axis_size(axis) == 0 else None
            for size, axis in zip(sizes, axes, strict=True)
        ]
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=wafer.sharding(P(*split)))

    a = shape(layer.rows, layer.features)
    weights = [shape(layer.features, n, dtype=jnp.int8 if layer.int8 else a.dtype)
               for n in layer.outputs]  # fmt: skip
    vectors = [shape(n) if wanted else None
               for wanted in (layer.biased, layer.int8) for n in layer.outputs]  # fmt: skip
    shapes = (a, weights, vectors)
    activation = getattr(jax.nn, layer.activation) if layer.activation else None

    def alone(a: jax.Array, weights: Any, vectors: Any) -> Any:
        count, results = len(weights), []
        for weight, bias, scales in zip(weights, vectors[:count], vectors[count:], strict=True):
            wide = jnp.float32 if activation or bias is not None or scales is not None else None
            c = jnp.matmul(a, weight.astype(a.dtype), preferred_element_type=wide)
            c = c if scales is None else c * scales
            c = c if bias is None else c + bias
            c = (c if activation is None else activation(c)).astype(a.dtype)
            split = shape(*c.shape).sharding
            results.append(jax.lax.with_sharding_constraint(c, split))
        return results

    def ours(a: jax.Array, weights: Any, vectors: Any) -> Any:
        count = len(weights)
        bias, scales = vectors[:count], vectors[count:]
        name = "gelu_tanh" if layer.activation == "gelu" else layer.activation
        return wk.matmul(a, weights, bias=bias, scales=scales, activation=name)

    return {
        "jit alone": lambda: (alone, shapes, {}),
        "wk.matmul": lambda: (ours, shapes, {}),
    }
