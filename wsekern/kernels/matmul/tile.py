"""This file is the product of one PE's tiles, in three forms: none of them moves or transposes any.

Public per-PE functions. A form says which factor is taken transposed: "nn" is `a @ b`, "nt" is
`a @ b^T`, "tn" is `a^T @ b`. The three are closed under differentiation (`GRADIENTS`), and in each
the same triple of matrices `S = X @ Y` stands: "nn" computes S from X and Y, "nt" X from S and Y,
"tn" Y from X and S. So a dimension of X and Y that lies along x in one and along y in the other,
their meeting dimension, is the one along which every algorithm has to move something; S stays.
Sums are in float32 (float64 of float64) and stay so.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import sum_dtype, widen_for_backend

Form = Literal["nn", "nt", "tn"]
Shape = tuple[int, ...]  # of the tile that a product results in
# form -> (form of the gradient of a, its factors), (form of the gradient of b, its factors); `c`
# stands for the gradient of the result.
GRADIENTS: dict[Form, tuple[tuple[Form, str, str], tuple[Form, str, str]]] = {
    "nn": (("nt", "c", "b"), ("tn", "a", "c")),
    "nt": (("nn", "c", "b"), ("tn", "c", "a")),
    "tn": (("nt", "b", "c"), ("nn", "a", "c")),
}
_SUMMED = {"nn": (-1, -2), "nt": (-1, -1), "tn": (-2, -2)}  # the dimension of a, of b


def product(form: Form, a: jax.Array, b: jax.Array, ndim: int) -> jax.Array:
    """The product of `a` and `b`, of `ndim` dimensions.

    A factor that has leading dimensions has those of the other; a matrix serves for all of them. A
    result without them is summed over them. Integers are taken as the other factor's dtype.
    """
    a, b = _floating(a, b)
    of_a, of_b = (axis % x.ndim for axis, x in zip(_SUMMED[form], (a, b), strict=True))
    leading = tuple(range(min(a.ndim, b.ndim) - 2))
    summed = leading if ndim == 2 else ()
    batch = leading if ndim > 2 else ()
    if form == "tn" or summed:
        a, b = widen_for_backend(a, b)
    dimensions = (((*summed, of_a), (*summed, of_b)), (batch, batch))
    c = lax.dot_general(a, b, dimensions, preferred_element_type=sum_dtype(a.dtype))
    return jnp.moveaxis(c, 0, -2) if a.ndim < b.ndim else c


def zeros(shape: Shape, *factors: jax.Array) -> jax.Array:
    """A sum of products of `factors` to begin with, that differs from PE to PE as they do."""
    batched = any(x.ndim > 2 for x in factors)
    along = (WAFERS, ROWS, COLS) if batched else (ROWS, COLS)
    dtype = jnp.result_type(*(x.dtype for x in factors))
    return fabric.varying(jnp.zeros(shape, sum_dtype(dtype)), along)


def sized(x: jax.Array, axis: int, length: int) -> jax.Array:
    """`x` cut, or grown with zeros, to `length` along `axis`."""
    axis %= x.ndim
    if x.shape[axis] >= length:
        return lax.slice_in_dim(x, 0, length, axis=axis)
    return jnp.pad(x, [(0, length - n if d == axis else 0) for d, n in enumerate(x.shape)])


def form(what: str, transpose_a: bool, transpose_b: bool) -> Form:
    """The form that takes these factors transposed.

    Raises:
      ValueError: both are to be.
    """
    if transpose_a and transpose_b:
        raise ValueError(
            f"{what}: transpose_a and transpose_b are both True: a^T @ b^T is (b @ a)^T, whose "
            "transposition is a move of its own; multiply b by a"
        )
    return "tn" if transpose_a else "nt" if transpose_b else "nn"


def check(what: str, form: Form, a, b) -> None:
    """Raises ValueError where the shapes of `a` and `b` do not fit one another."""
    for name, x in (("a", a), ("b", b)):
        if x.ndim < 2:
            raise ValueError(
                f"{what}: {name} is {x.shape}, it must have at least two dimensions; give a "
                "vector a row or a column of its own, or use gemv"
            )
    if b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"{what}: a is {a.shape} and b is {b.shape}: b must be a matrix, or have a's leading "
            f"dimensions {a.shape[:-2]}"
        )
    of_a, of_b = (-2 if form == "tn" else -1), (-1 if form == "nt" else -2)
    if a.shape[of_a] != b.shape[of_b]:
        kinds = {-1: "columns", -2: "rows"}
        raise ValueError(
            f"{what}: a is {a.shape} and b is {b.shape}: a's {kinds[of_a]} ({a.shape[of_a]}) must "
            f"equal b's {kinds[of_b]} ({b.shape[of_b]})"
        )


def _floating(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    if jnp.issubdtype(a.dtype, jnp.integer):
        return a.astype(b.dtype), b
    return a, b.astype(a.dtype)
