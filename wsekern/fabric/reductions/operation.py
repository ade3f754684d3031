"""This file is what a reduction does with two tiles, and the tile that changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Op = Literal["sum", "max", "min", "mean"]


class Operation(NamedTuple):
    """How tiles are combined. A mean is a sum here, divided when it is whole."""

    combine: Callable[[jax.Array, jax.Array], jax.Array]
    neutral: Callable[[Any], Any]  # of a dtype


def _lowest(dtype):
    if dtype == jnp.bool_:
        return False
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype):
    if dtype == jnp.bool_:
        return True
    return np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max


_SUM = Operation(jnp.add, lambda dtype: 0)
OPERATIONS: dict[str, Operation] = {
    "sum": _SUM,
    "mean": _SUM,
    "max": Operation(jnp.maximum, _lowest),
    "min": Operation(jnp.minimum, _highest),
}
