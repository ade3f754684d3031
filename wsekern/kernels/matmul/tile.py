"""Products of one PE's tiles, in three forms that need no transpose.

Public per-PE functions. A form says which factor is taken transposed. All three forms are about
the same three matrices, and differ in which one they compute:

    "nn"   S = X @ Y      a is X, b is Y
    "nt"   X = S @ Y^T    a is S, b is Y
    "tn"   Y = X^T @ S    a is X, b is S

The gradient of each form consists of the two others (`GRADIENTS`). Every matrix has its rows along
y and its columns along x, so S never has to move: its PE multiplies a row of X's tiles by a column
of Y's. The meeting dimension is what the columns of X and the rows of Y have in common. It lies
along x in X and along y in Y, and this is why every algorithm has to move something.

Sums are float32 (float64 if the factors are) and stay so.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from wsekern import fabric
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import sum_dtype, widen_for_backend

Form = Literal["nn", "nt", "tn"]
Matrix = Literal["X", "Y", "S"]
# form -> which matrix a, b and the result are
ROLES: dict[Form, tuple[Matrix, Matrix, Matrix]] = {
    "nn": ("X", "Y", "S"),
    "nt": ("S", "Y", "X"),
    "tn": ("X", "S", "Y"),
}
# form -> (form of the gradient of a, its factors), (form of the gradient of b, its factors); `c`
# stands for the gradient of the result.
GRADIENTS: dict[Form, tuple[tuple[Form, str, str], tuple[Form, str, str]]] = {
    "nn": (("nt", "c", "b"), ("tn", "a", "c")),
    "nt": (("nn", "c", "b"), ("tn", "c", "a")),
    "tn": (("nt", "b", "c"), ("nn", "a", "c")),
}
SUMMED: dict[Form, tuple[int, int]] = {  # the dimension of a, of b
    "nn": (-1, -2),
    "nt": (-1, -1),
    "tn": (-2, -2),
}


class TileResult(NamedTuple):
    """What a product of tiles is to return: this PE's tile of the result."""

    shape: tuple[int, ...]
    precision: lax.PrecisionLike = None  # in which factors are multiplied
    sums: jnp.dtype | None = None  # their dtype; None: as wide as `sum_dtype` has it

    def with_shape(self, *shape: int) -> "TileResult":
        """The same with another shape."""
        return self._replace(shape=shape)


@runtime_checkable
class TileAlgorithm(Protocol):
    """An algorithm as one PE runs it: it moves tiles between PEs and multiplies them.

    Arguments and results are this PE's tiles. The fields of an algorithm's class are its options.
    """

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y."""

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T."""

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S."""


TileProduct = Callable[
    [Num[Array, "... _ _"], Num[Array, "... _ _"], TileResult], Float[Array, "... _ _"]
]


def in_form(algorithm: TileAlgorithm, form: Form) -> TileProduct:
    """The product of `algorithm` in `form`."""
    return {"nn": algorithm.nn, "nt": algorithm.nt, "tn": algorithm.tn}[form]


def product(
    form: Form, a: Num[Array, "... _ _"], b: Num[Array, "... _ _"], result: TileResult
) -> Float[Array, "... _ _"]:
    """The product of this PE's `a` and `b`, which moves nothing.

    Leading dimensions of both factors are the same, or one factor is a matrix and serves for all of
    the other's. If the result has none, the products are summed over them. A factor of integers is
    converted to the other's dtype.
    """
    a, b = _as_floating(a, b)
    ndim = len(result.shape)
    summed_a, summed_b = (axis % x.ndim for axis, x in zip(SUMMED[form], (a, b), strict=True))
    leading = tuple(range(min(a.ndim, b.ndim) - 2))
    summed = leading if ndim == 2 else ()
    batch = leading if ndim > 2 else ()
    # Both factors are then contracted over their rows, which not every backend can in 16 bits.
    if form == "tn" or summed:
        a, b = widen_for_backend(a, b)
    c = lax.dot_general(
        a,
        b,
        (((*summed, summed_a), (*summed, summed_b)), (batch, batch)),
        precision=result.precision,
        preferred_element_type=result.sums or sum_dtype(a.dtype),
    )
    # dot_general puts the free dimensions of `a`, its rows, before those of `b`. If `b` alone has
    # leading dimensions: a [M, K] and b [B, K, N] give [M, B, N].
    return jnp.moveaxis(c, 0, -2) if a.ndim < b.ndim else c


def zeros(shape: tuple[int, ...], *factors: Num[Array, "..."]) -> Float[Array, "..."]:
    """Zeros to sum products of `factors` into, typed as varying from PE to PE."""
    batched = any(x.ndim > 2 for x in factors)
    along = (WAFERS, ROWS, COLS) if batched else (ROWS, COLS)
    dtype = jnp.result_type(*(x.dtype for x in factors))
    return fabric.varying(jnp.zeros(shape, sum_dtype(dtype)), along)


def form_of(operation: str, transpose_a: bool, transpose_b: bool) -> Form:
    """The form in which these factors are transposed.

    Raises:
      ValueError: both are.
    """
    if transpose_a and transpose_b:
        raise ValueError(
            f"{operation}: transpose_a and transpose_b are both True: a^T @ b^T is (b @ a)^T, "
            "whose transposition is a move of its own; multiply b by a"
        )
    return "tn" if transpose_a else "nt" if transpose_b else "nn"


def check_shapes(
    operation: str,
    form: Form,
    a: Num[Array | jax.ShapeDtypeStruct, "..."],
    b: Num[Array | jax.ShapeDtypeStruct, "..."],
) -> None:
    """Raises ValueError if `a` and `b` cannot be multiplied in `form`."""
    for name, x in (("a", a), ("b", b)):
        if x.ndim < 2:
            raise ValueError(
                f"{operation}: {name} is {x.shape}, it must have at least two dimensions; give a "
                "vector a row or a column of its own, or use gemv"
            )
    if b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"{operation}: a is {a.shape} and b is {b.shape}: b must be a matrix, or have a's "
            f"leading dimensions {a.shape[:-2]}"
        )
    axis_a, axis_b = (-2 if form == "tn" else -1), (-1 if form == "nt" else -2)
    if a.shape[axis_a] != b.shape[axis_b]:
        kinds = {-1: "columns", -2: "rows"}
        raise ValueError(
            f"{operation}: a is {a.shape} and b is {b.shape}: a's {kinds[axis_a]} "
            f"({a.shape[axis_a]}) must equal b's {kinds[axis_b]} ({b.shape[axis_b]})"
        )


def _as_floating(
    a: Num[Array, "... _ _"], b: Num[Array, "... _ _"]
) -> tuple[Float[Array, "... _ _"], Float[Array, "... _ _"]]:
    if jnp.issubdtype(a.dtype, jnp.integer):
        return a.astype(b.dtype), b
    return a, b.astype(a.dtype)
