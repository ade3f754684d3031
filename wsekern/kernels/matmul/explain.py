"""Why `matmul` takes the algorithm it takes, in numbers that print as a table."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wsekern.kernels.matmul import choice, tile
from wsekern.kernels.matmul.epilogue import Activation, find_activation
from wsekern.kernels.matmul.problem import Described, MatmulProblem
from wsekern.kernels.matmul.signature import Algorithm, Shape, Vectors
from wsekern.wafer import context
from wsekern.wafer.explanation import Explanation
from wsekern.wafer.wafer import Wafer


def explain_matmul(
    a: Described | Shape,
    b: Described | Shape | Sequence[Described | Shape],
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    bias: Vectors = None,
    activation: Activation = None,
    scales: Vectors = None,
    algorithm: Algorithm = "auto",
    precision: jax.lax.PrecisionLike = None,
    dtype: Any = jnp.float32,
    wafer: Wafer | None = None,
) -> Explanation:
    """Which algorithm `matmul` takes for the same arguments, and what each would cost a PE.

    `print` the result, or read its `algorithm`, `why` and `candidates`: of each algorithm the words
    (32 bits, received) and the dependent steps of one product, the bytes that a PE holds of others'
    tiles at a time, and on wafers the predicted cycles. Nothing runs.

    Args:
      a: left factor: an array, anything with its shape and dtype, or a shape.
      b: right factor, likewise, or a list of them.
      transpose_a: as in `matmul`.
      transpose_b: as in `matmul`.
      bias: as in `matmul`; it changes no cost and is not looked at.
      activation: likewise, but its name must be known.
      scales: as in `matmul`; they change no cost and are not looked at.
      algorithm: as in `matmul`.
      precision: as in `matmul`; it changes no cost.
      dtype: of every factor that is given as a shape.
      wafer: by default the current wafer.

    Raises:
      ValueError: both factors are transposed, the shapes do not fit one another, or `activation`
        or `algorithm` is unknown or cannot serve the grid.
    """
    form = tile.form_of("explain_matmul", transpose_a, transpose_b)
    is_one = not isinstance(b, list | tuple) or (isinstance(b, tuple) and isinstance(b[0], int))
    factors: Sequence[Any] = (b,) if is_one else b  # type: ignore[assignment]
    a, bs = _describe(a, dtype), [_describe(factor, dtype) for factor in factors]
    for right in bs:
        tile.check_shapes("explain_matmul", form, a, right)
    name = choice.find_algorithm("explain_matmul", algorithm)
    find_activation("explain_matmul", activation)
    wafer = context.resolve(wafer, computes=False)
    if wafer is None or 0 in (*a.shape, *(math.prod(right.shape) for right in bs)):
        why = "no wafer of more than one PE is in force, or there is nothing to multiply"
        return Explanation(operation="matmul", algorithm="plain", why=why, wafer=wafer)
    problem = MatmulProblem.of(form, a, bs, wafer)
    best, why = choice.choose("explain_matmul", problem, name)
    return Explanation(
        operation="matmul",
        algorithm=best.plan.name,
        why=why,
        wafer=wafer,
        by_auto=name == "auto",
        candidates=choice.price_all(problem),
    )


def _describe(factor: Described | Shape, dtype: Any) -> jax.ShapeDtypeStruct:
    if isinstance(factor, tuple):
        return jax.ShapeDtypeStruct(factor, dtype)
    return jax.ShapeDtypeStruct(factor.shape, factor.dtype)
