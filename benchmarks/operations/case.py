"""One operation to compile: its function, its operands, and the gradient of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from wsekern.wafer.wafer import Wafer


class OperationCase(NamedTuple):
    """An operation, compiled within `with wafer`."""

    name: str  # the public names, and what is special: "matmul, cannon"
    function: Callable[..., Any]
    operands: tuple[Any, ...]  # pytrees of shapes
    has_gradient: bool = True
    needs: Callable[[Wafer], bool] = lambda wafer: True  # the wafers that it is meant for


@dataclasses.dataclass(frozen=True)
class OperandShapes:
    """Makes the shapes of a wafer's operands."""

    wafer: Wafer
    dtype: np.dtype

    def floats(self, *shape: int, spec: P | None = None) -> jax.ShapeDtypeStruct:
        """An array of the case's dtype; by default its last two dimensions lie over y and x."""
        return self._array(shape, self.dtype, spec)

    def integers(
        self, *shape: int, spec: P, dtype: jax.typing.DTypeLike = jnp.int32
    ) -> jax.ShapeDtypeStruct:
        """An array of integers."""
        return self._array(shape, np.dtype(dtype), spec)

    def _array(self, shape: Sequence[int], dtype: np.dtype, spec: P | None) -> jax.ShapeDtypeStruct:
        # Without a layout, `wk.compile` gives one.
        sharding = None if spec is None else self.wafer.sharding(spec)
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of the sum of squares of `function`'s results, by every floating operand."""

    def backward(*operands: Any) -> list[jax.Array]:
        leaves, tree = jax.tree_util.tree_flatten(operands)
        places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

        def sum_of_squares(values: list[jax.Array]) -> jax.Array:
            changed = dict(zip(places, values, strict=True))
            all_leaves = [changed.get(i, x) for i, x in enumerate(leaves)]
            results = function(*jax.tree_util.tree_unflatten(tree, all_leaves))
            floats = [r for r in jax.tree.leaves(results) if jnp.issubdtype(r.dtype, jnp.floating)]
            return jnp.stack([jnp.sum(jnp.square(r.astype(jnp.float32))) for r in floats]).sum()

        return jax.grad(sum_of_squares)([leaves[i] for i in places])

    return backward
