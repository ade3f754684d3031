"""What is known of one right factor of a product: its matrix, scales, bias and tile.

A right factor is a pytree, and the gradient of one is another.
"""

import dataclasses
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Num

from wsekern.wafer import layout

# A field holds an array, a gradient, or on the way through `Wafer.map` a spec.
Leaf = TypeVar("Leaf")
Other = TypeVar("Other")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RightFactor(Generic[Leaf]):
    """`b` of `activation(a @ b * scales + bias)`, with its scales and bias."""

    matrix: Leaf  # [..., K, N], or transposed
    bias: Leaf | None = None  # [N]
    scales: Leaf | None = None  # [N], of an int8 matrix
    # Rows and columns of a PE's tile of the product; set once the factor is laid out on a wafer.
    tile: tuple[int, int] = dataclasses.field(default=(0, 0), metadata={"static": True})

    @classmethod
    def of(
        cls, matrix: ArrayLike, bias: ArrayLike | None, scales: ArrayLike | None
    ) -> "ArrayFactor":
        """The right factor that a caller gives, as arrays."""
        return RightFactor(
            matrix=layout.as_array(matrix),
            bias=None if bias is None else layout.as_array(bias),
            scales=None if scales is None else layout.as_array(scales),
        )

    def replace(
        self, matrix: Other, bias: Other | None, scales: Other | None
    ) -> "RightFactor[Other]":
        """Another factor, or a gradient, with a tile of the same size."""
        return RightFactor(matrix=matrix, bias=bias, scales=scales, tile=self.tile)

    def with_float0(self, factor: "ArrayFactor") -> "RightFactor[Any]":
        """This gradient of `factor`, with what JAX expects for a matrix of integers."""
        if is_trained(factor.matrix):
            return self
        zeros = np.zeros(factor.matrix.shape, jax.dtypes.float0)
        return self.replace(matrix=zeros, bias=self.bias, scales=self.scales)

    def specs(self: "ArrayFactor", vector_axis: str) -> "RightFactor[P]":
        """How a factor like this lies: its matrix tiled, its vectors along an axis."""
        vector = layout.tiled(1, vector_axis)
        return RightFactor(
            matrix=layout.tiled(self.matrix.ndim),
            # None stays None: in a pytree it is no leaf, and `jax.tree.map` over both must match.
            bias=None if self.bias is None else vector,
            scales=None if self.scales is None else vector,
            tile=self.tile,  # static, hence part of the tree's structure
        )


# A factor as arrays, whole or one PE's tile; and a gradient of one, None for what is not trained.
ArrayFactor = RightFactor[Num[Array, "..."]]
FactorGradient = RightFactor[Num[Array, "..."] | None]


def is_trained(matrix: Num[Array, "..."]) -> bool:
    """Whether a matrix has a gradient; integers have none."""
    return jnp.issubdtype(matrix.dtype, jnp.floating)


def check_right_factor(operation: str, a: Num[Array, "..."], right: ArrayFactor, N: int) -> None:
    """Raises ValueError if dtypes, or the sizes of bias and scales, do not fit `a @ b`."""
    b, scales = right.matrix, right.scales
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"{operation}: a is {a.dtype}; cast it to a floating dtype")
    if b.dtype == jnp.int8 and scales is None:
        raise ValueError(
            f"{operation}: b is int8 and scales is None; give the scale of each of its {N} output "
            "channels, scales=[N]"
        )
    if scales is not None and b.dtype != jnp.int8:
        raise ValueError(
            f"{operation}: scales are for int8 weights, b is {b.dtype}; leave them out"
        )
    if scales is None and a.dtype != b.dtype:
        raise ValueError(f"{operation}: a is {a.dtype} and b is {b.dtype}: cast one of them first")
    for name, vector in (("bias", right.bias), ("scales", scales)):
        if vector is None:
            continue
        if vector.shape != (N,):
            raise ValueError(
                f"{operation}: {name} is {vector.shape}, it must be ({N},): one for each column of "
                "the result"
            )
        if not jnp.issubdtype(vector.dtype, jnp.floating):
            raise ValueError(f"{operation}: {name} is {vector.dtype}; cast it to a floating dtype")
