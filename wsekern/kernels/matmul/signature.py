"""The type of `matmul`, for editors and type checkers; at run time it is a plain function."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, cast, overload, runtime_checkable

import jax
from jaxtyping import Array, Float, Int8

from wsekern.kernels.matmul.epilogue import Activation
from wsekern.kernels.matmul.problem import Described
from wsekern.wafer.explanation import Explanation, explained_by
from wsekern.wafer.wafer import Wafer

Algorithm = Literal[
    "auto",
    "allgather",
    "summa",
    "cannon",
    "mesh_gemm",
    "mesh",
    "collective",
    "stationary",
    "2.5d",
    "xla",
]
Matrix = Float[Array, "... _ _"] | Int8[Array, "... _ _"]
Shape = tuple[int, ...]
# Of one right factor, or of several.
Vectors = Described | None | Sequence[Described | None]


@runtime_checkable
class Explain(Protocol):
    """The type of `matmul.explain`."""

    def __call__(
        self,
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
        dtype: Any = ...,
        wafer: Wafer | None = None,
    ) -> Explanation: ...


@runtime_checkable
class Matmul(Protocol):
    """One right factor gives an array, a tuple of them a tuple."""

    @overload
    def __call__(
        self,
        a: Float[Array, "*batch M K"],
        b: Float[Array, "... K N"] | Int8[Array, "... K N"],
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Float[Array, " N"] | None = None,
        activation: Activation = None,
        scales: Float[Array, " N"] | None = None,
        algorithm: Algorithm = "auto",
        precision: jax.lax.PrecisionLike = None,
        wafer: Wafer | None = None,
    ) -> Float[Array, "*batch M N"]: ...

    @overload
    def __call__(
        self,
        a: Float[Array, "*batch M K"],
        b: Sequence[Matrix],
        *,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Sequence[Float[Array, " _"] | None] | None = None,
        activation: Activation = None,
        scales: Sequence[Float[Array, " _"] | None] | None = None,
        algorithm: Algorithm = "auto",
        precision: jax.lax.PrecisionLike = None,
        wafer: Wafer | None = None,
    ) -> tuple[Float[Array, "*batch M _"], ...]: ...

    @property
    def explain(self) -> Explain:
        """Which algorithm "auto" takes for these factors, and what each would cost."""


def with_signature(explain: Explain) -> Callable[[Callable[..., Any]], Matmul]:
    """The decorator that gives `matmul` its `explain`, and makes it known by the type above."""

    def attach(function: Callable[..., Any]) -> Matmul:
        return cast(Matmul, explained_by(explain)(function))

    return attach
