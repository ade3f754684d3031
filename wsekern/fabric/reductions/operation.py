"""The operations of reductions: how two tiles are combined, and the neutral element."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Op = Literal["sum", "max", "min", "mean"]


class Operation(NamedTuple):
    """One operation. A mean is a sum here; it is divided at the end."""

    combine: Callable[[Array, Array], Array]
    neutral: Callable[[Any], Any]  # from a dtype to the value that changes nothing


def _lowest(dtype: Any) -> Any:
    if dtype == jnp.bool_:
        return False
    return -np.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _highest(dtype: Any) -> Any:
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
