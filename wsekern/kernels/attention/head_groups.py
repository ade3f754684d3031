"""Take a PE's heads in groups: one travels while another is computed, or all wait their turn.

Public per-PE functions, without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from wsekern.kernels.attention.operands import Floats
from wsekern.kernels.attention.plan import AttentionPlan

Result = TypeVar("Result")


def in_groups(
    run: Callable[..., Result],
    floats: Floats,
    plan: AttentionPlan,
    for_gradients: tuple[Float[Array, "..."] | None, ...] = (),
) -> list[Result]:
    """`run(group)` for each group of neighboring heads, with that part of the other operands.

    Args:
      run: gets the operands of a group, and the parts of `for_gradients`.
      floats: a PE's operands; of several groups, without a bias.
      plan: says how many groups there are, and whether each waits for the one before.
      for_gradients: the log-sum-exps `[B, N, T]`, the gradient of the result `[B, T, N, H]`, and
        its dot product with the result `[B, T, N]`.
    """
    n = plan.head_groups
    if n == 1:
        return [run(floats, *for_gradients)]
    parts = [jnp.split(x, n, 2) for x in (floats.q, floats.k, floats.v)]
    sinks = [None] * n if floats.sinks is None else jnp.split(floats.sinks, n)
    axes = zip(for_gradients, (1, 2, 2)[: len(for_gradients)], strict=True)
    more = (
        zip(*(_split(x, n, axis) for x, axis in axes), strict=True) if for_gradients else [()] * n
    )
    results: list[Any] = []
    for q, k, v, sink, of_rows in zip(*parts, sinks, more, strict=True):
        operands = Floats(q, k, v, None, sink), of_rows
        if plan.takes_turns and (results or plan.merges):
            # In a ring, XLA would lay out the operands of all groups at once for the first.
            results[-1:], operands = lax.optimization_barrier((results[-1:], operands))
        group, of_rows = operands
        results.append(run(group, *of_rows))
    return results


def join(parts: Sequence[Float[Array, "..."]], axis: int) -> Float[Array, "..."]:
    """The groups' arrays side by side."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def join_heads(parts: Sequence[Float[Array, "B t _ H"]]) -> Float[Array, "B t N H"]:
    """The groups' tiles side by side."""
    # A kernel leaves heads in front: join them there, and move the axis once.
    return (
        parts[0] if len(parts) == 1 else join([x.swapaxes(1, 2) for x in parts], 1).swapaxes(1, 2)
    )


def _split(x: Float[Array, "..."] | None, n: int, axis: int) -> Sequence[Any]:
    return [None] * n if x is None else jnp.split(x, n, axis)
