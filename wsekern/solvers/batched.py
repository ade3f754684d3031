"""Loops and choices that keep their shardings under `jax.vmap`.

Under vmap, JAX turns a loop's condition into a choice by lanes, `select`, whose condition then has
other axes than the fields, which Explicit axes of a mesh refuse. Here a loop runs until every lane
has finished, and a lane that has finished keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

State = TypeVar("State")


def where(condition: Bool[Array, ""], a: State, b: State) -> State:
    """`a` if the condition holds, else `b`: pytrees of arrays of one structure."""

    def choose(x: Array, y: Array) -> Array:
        split = [s for s in (jax.typeof(x).sharding, jax.typeof(y).sharding) if any(s.spec)]
        if not split:
            return jnp.where(condition, x, y)
        sharding = split[0]
        return jnp.where(jnp.broadcast_to(condition, y.shape, out_sharding=sharding), x, y)

    return jax.tree.map(choose, a, b)


def while_loop(
    goes_on: Callable[[State], Bool[Array, ""]], body: Callable[[State], State], first: State
) -> State:
    """As `jax.lax.while_loop`."""

    def step(state: State) -> State:
        return _unless(~goes_on(state), state, body(state))

    return lax.while_loop(lambda state: _in_any_lane(goes_on(state)), step, first)


def cond(condition: Bool[Array, ""], compute: Callable[[], State], otherwise: State) -> State:
    """`compute()` if the condition holds, else `otherwise`; not computed if it holds in no lane."""
    computed = lax.cond(_in_any_lane(condition), compute, lambda: otherwise)
    return _unless(~condition, otherwise, computed)


@custom_vmap
def _in_any_lane(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    return condition


@_in_any_lane.def_vmap
def _in_any_lane_batched(
    lanes: int, is_batched: list[bool], condition: Bool[Array, " lanes"]
) -> tuple[Bool[Array, ""], bool]:
    return _in_any_lane(jnp.any(condition, axis=0)), False


@custom_vmap
def _unless(finished: Bool[Array, ""], old: State, new: State) -> State:
    """`new`; under vmap `old` in the lanes that have finished."""
    return new


@_unless.def_vmap
def _unless_batched(
    lanes: int, is_batched: list[Any], finished: Bool[Array, "*lanes"], old: State, new: State
) -> tuple[State, Any]:
    axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
    chosen = jax.vmap(where, in_axes=axes, axis_size=lanes)(finished, old, new)
    return chosen, jax.tree.map(lambda _: True, chosen)
