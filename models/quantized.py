"""Weights kept as integers of eight or four bits, with a scale for each output or group.

A weight is `integer * scale`, or `integer * scale + minimum`. A scale belongs to an output channel,
or to a group of 32 values along the inputs of one, as in the blocks of a GGUF file. The layer that
multiplies by a weight widens it, one layer at a time. With `activations` nothing is widened: the
rows of the input are rounded too, and products are exact sums of integers, whose bits do not depend
on the number of rows. T. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers
at Scale", 2022, section 3.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Int8, Num

import wsekern as wk
from wsekern.wafer import context
from wsekern.wafer.axes import COLS, ROWS, WAFERS

Activations = Literal["int8", "int16"] | None
GROUP = 32  # values that share a scale, where an output channel has several
LARGEST = 127  # the largest magnitude of an int8 that is rounded to
_FINER = 254.0  # steps of the second term in one of the first: half a step is 127 of them
_CHUNK = 2048  # rows of a table that are widened at once


class Parts(NamedTuple):
    """The arrays of a quantized weight, on the host or on a device.

    Layers, and experts, are stacked in leading dimensions that all arrays have. A weight [I, O] is:

        int8 by output    values int8 [I, O], scales [O]
        int8 in groups    values int8 [I/32, 32, O], scales [I/32, O]
        int4 in groups    values uint8 [I/32, 16, O], scales [I/32, O]

    In int4, byte i of a group has value i in its low half, value 16 + i in its high half. Without
    minima a half of 8 means 0. A table [V, D] is int8 alone: values [V, D] and scales [V], or
    values [V, D/32, 32] and scales [V, D/32].
    """

    values: Num[Array | np.ndarray, "..."]
    scales: Float[Array | np.ndarray, "..."]
    minima: Float[Array | np.ndarray, "..."] | None = None  # of the shape of `scales`


class QuantizedWeight(nnx.Module):
    """A weight `[in, out]` of a product, or of each expert's, kept as integers."""

    def __init__(
        self, parts: Parts, axes: tuple[str | None, ...], grouped: bool, activations: Activations
    ) -> None:
        """A weight with the arrays of `parts`.

        Args:
          parts: the arrays.
          axes: the names of the dimensions of the weight itself, `(.., "in", "out")`.
          grouped: whether scales belong to groups of 32, and not to output channels.
          activations: to how many bits what is multiplied by the weight is rounded; None: not.

        Raises:
          ValueError: `activations` is given, and scales belong to groups.
        """
        if activations is not None and grouped:
            raise ValueError(
                f"activations={activations!r} needs one scale for each output channel, the weight "
                "has one for each group of 32; use weights='int8'"
            )
        self.grouped, self.activations = grouped, activations
        leading = axes[:-2]
        self.values = nnx.Variable(
            parts.values, axes=(*leading, "in", *([None] if grouped else []), "out")
        )
        scale_axes = (*leading, *(["in"] if grouped else []), "out")
        self.scales = nnx.Variable(parts.scales, axes=scale_axes)
        self.minima = None if parts.minima is None else nnx.Variable(parts.minima, axes=scale_axes)

    def dequantize(self, dtype: jax.typing.DTypeLike) -> Float[Array, "*E I O"]:
        """The weight in `dtype`; each PE widens its own tile."""
        leading = (WAFERS,) if "expert" in self.values.axes else ()
        groups = (None,) if self.grouped else ()
        of_scales = P(*leading, *([ROWS] if self.grouped else []), COLS)
        return wk.layout.tilewise(
            functools.partial(_widen, grouped=self.grouped, dtype=jnp.dtype(dtype)),
            *_arrays(self),
            in_specs=(P(*leading, ROWS, *groups, COLS), of_scales, of_scales)[: len(_arrays(self))],
            out_specs=P(*leading, ROWS, COLS),
        )

    def right_factor(
        self, dtype: jax.typing.DTypeLike
    ) -> tuple[Num[Array, "I O"], Float[Array, " O"] | None]:
        """What `wk.matmul` takes: the widened weight, or integers and their scales."""
        if self.grouped:
            return self.dequantize(dtype), None
        return self.values[...], self.scales[...]

    def multiply_rounded(self, rows: "RoundedRows") -> Float[Array, "*B O"]:
        """`rows @ weight` in float32, from exact sums of integers."""
        if context.resolve(None) is not None:
            # A float32 holds integers of 16 bits, and the product rounds its sums alone.
            weight, scales = self.values[...], self.scales[...]
            return wk.matmul(rows.joined(), weight, scales=scales) * rows.scales / rows.steps
        return rows.product(self.values[...], 0) * _as_row(self.scales[...], rows.scales.ndim)


class QuantizedTable(nnx.Module):
    """An embedding or a head, `[vocab, in]`, kept as int8."""

    def __init__(self, parts: Parts, grouped: bool, activations: Activations) -> None:
        """A table with the arrays of `parts`.

        Args:
          parts: the arrays.
          grouped: whether scales belong to groups of 32, and not to rows.
          activations: to how many bits features are rounded that a head multiplies, if scales
            belong to rows; None: not.
        """
        self.grouped, self.activations = grouped, None if grouped else activations
        groups = (None,) if grouped else ()
        self.values: Any = nnx.Variable(parts.values, axes=("vocab", "in", *groups))
        scale_axes = ("vocab", *(["in"] if grouped else []))
        self.scales = nnx.Variable(parts.scales, axes=scale_axes)
        self.minima = None if parts.minima is None else nnx.Variable(parts.minima, axes=scale_axes)

    def dequantize(self, dtype: jax.typing.DTypeLike) -> Float[Array, "V D"]:
        """The table in `dtype`; each PE widens its own tile."""
        groups = (None,) if self.grouped else ()
        of_scales = P(COLS, *([ROWS] if self.grouped else []))
        return wk.layout.tilewise(
            functools.partial(_widen_rows, grouped=self.grouped, dtype=jnp.dtype(dtype)),
            *_arrays(self),
            in_specs=(P(COLS, ROWS, *groups), of_scales, of_scales)[: len(_arrays(self))],
            out_specs=P(COLS, ROWS),
        )

    def rows(self, tokens: Int[Array, "B T"], dtype: jax.typing.DTypeLike) -> Float[Array, "B T D"]:
        """The rows of `tokens`; a token outside 0 to V - 1 gives a row of NaN."""
        if context.resolve(None) is not None:
            return wk.embedding(tokens, self.dequantize(dtype))
        count = self.values.shape[0]
        known = (tokens >= 0) & (tokens < count)
        taken = [jnp.take(array, tokens, axis=0, mode="clip") for array in _arrays(self)]
        rows = _widen_rows(*taken, grouped=self.grouped, dtype=jnp.dtype(dtype))
        return jnp.where(known[..., None], rows, jnp.nan)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """`hidden @ table.T`, in the dtype of `hidden`; a few rows are widened at a time."""
        if context.resolve(None) is not None:
            return wk.matmul(hidden, self.dequantize(hidden.dtype).T)
        if self.activations is not None:
            sums = round_rows(hidden, self.activations).product(self.values[...], 1)
            return (sums * _as_row(self.scales[...], sums.ndim)).astype(hidden.dtype)
        count = self.values.shape[0]
        chunks, whole = count // _CHUNK, count // _CHUNK * _CHUNK

        def multiply(start: Int[Array, ""] | int, size: int) -> Float[Array, "B T _"]:
            taken = [jax.lax.dynamic_slice_in_dim(a, start, size) for a in _arrays(self)]
            table = _widen_rows(*taken, grouped=self.grouped, dtype=hidden.dtype)
            return _product_with_rows(hidden, table, hidden.dtype)

        outs = [multiply(whole, count - whole)] if whole < count else []
        if chunks:
            starts = _CHUNK * jnp.arange(chunks)
            by_chunk = jax.lax.map(functools.partial(multiply, size=_CHUNK), starts)
            outs.insert(0, jnp.moveaxis(by_chunk, 0, 2).reshape(*hidden.shape[:2], whole))
        return jnp.concatenate(outs, axis=-1)


class RoundedRows(NamedTuple):
    """Rows as integers: `terms[0] * scales + terms[1] * scales / 254`, with one term or two."""

    terms: Int8[Array, "N *B I"]
    scales: Float[Array, "*B 1"]

    @property
    def steps(self) -> float:
        """How many steps of the last term there are in one of the first."""
        return _FINER ** (len(self.terms) - 1)

    def joined(self) -> Float[Array, "*B I"]:
        """The integers in steps of the last term, as floats."""
        wide = self.terms.astype(jnp.float32)
        return wide[0] if len(wide) == 1 else wide[0] * _FINER + wide[1]

    def product(self, matrix: Int8[Array, "_ _"], contracted: int) -> Float[Array, "*B O"]:
        """The product with an int8 matrix along its dimension `contracted`, in float32."""
        terms = self.terms.reshape(-1, self.terms.shape[-1])
        # XLA's CPU backend takes ten times as long for one row as for two.
        rows = jnp.concatenate([terms, terms]) if len(terms) == 1 else terms
        sums = jax.lax.dot_general(
            rows, matrix, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.int32
        )
        sums = sums[: len(terms)].reshape(*self.terms.shape[:-1], -1).astype(jnp.float32)
        if len(sums) == 1:
            return sums[0] * self.scales
        return (sums[0] + sums[1] * (1 / _FINER)) * self.scales


def round_rows(x: Float[Array, "*B I"], activations: Activations) -> RoundedRows:
    """Each row of `x`, rounded by a scale of its own.

    Args:
      x: the rows.
      activations: "int8" for one term of eight bits; "int16" for a second one, of what the first
        leaves.
    """
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    # A row of zeros stays zero. One with a NaN has the scale NaN, so its products are NaN.
    scales = jnp.where(largest == 0, 1.0, largest / LARGEST)
    steps = wide / scales
    first = jnp.round(steps)
    terms = [first]
    if activations == "int16":
        terms.append(jnp.round((steps - first) * _FINER))
    return RoundedRows(jnp.stack(terms).astype(jnp.int8), scales)


def _as_row(vector: Float[Array, " O"], dimensions: int) -> Float[Array, "... O"]:
    return vector.reshape(*[1] * (dimensions - 1), -1)


def _arrays(weight: QuantizedWeight | QuantizedTable) -> list[Array]:
    arrays = [weight.values[...], weight.scales[...]]
    return arrays if weight.minima is None else [*arrays, weight.minima[...]]


def _product_with_rows(a: Num[Array, "B T D"], rows: Num[Array, "V D"], dtype: Any) -> Array:
    contracted = (((a.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(a, rows, contracted, preferred_element_type=dtype)


def _widen(
    values: Num[Array, "..."],
    scales: Float[Array, "*E _ O"],
    minima: Float[Array, "*E _ O"] | None = None,
    *,
    grouped: bool,
    dtype: np.dtype,
) -> Float[Array, "*E I O"]:
    if not grouped:
        return (values.astype(jnp.float32) * scales[..., None, :].astype(jnp.float32)).astype(dtype)
    *leading, groups, _, d_out = values.shape
    scales, offset = scales[..., None, None, :].astype(jnp.float32), 0
    if values.dtype == jnp.uint8:
        shifts = jnp.asarray([0, 4], jnp.uint8).reshape(*[1] * (values.ndim - 2), 2, 1, 1)
        # Not joined by `concatenate`, which XLA's CPU backend computes seven times slower.
        values, offset = (values[..., None, :, :] >> shifts) & 15, 0 if minima is not None else 8
    else:
        values = values[..., None, :, :]
    # An integer times a scale of 16 bits is exact in float32: the sum alone is rounded.
    wide = (values.astype(jnp.float32) - offset) * scales
    if minima is not None:
        wide = wide + minima[..., None, None, :].astype(jnp.float32)
    return wide.reshape(*leading, groups * GROUP, d_out).astype(dtype)


def _widen_rows(
    values: Int8[Array, "..."],
    scales: Float[Array, "..."],
    minima: Float[Array, "..."] | None = None,
    *,
    grouped: bool,
    dtype: np.dtype,
) -> Float[Array, "*V D"]:
    wide = values.astype(jnp.float32) * scales[..., None].astype(jnp.float32)
    if minima is not None:
        wide = wide + minima[..., None].astype(jnp.float32)
    return (wide.reshape(*wide.shape[:-2], -1) if grouped else wide).astype(dtype)
