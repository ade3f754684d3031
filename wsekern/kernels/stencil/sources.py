"""Sources and receivers: values added to a field, or read from it, at points after each step."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from wsekern import fabric
from wsekern.kernels.stencil import geometry
from wsekern.kernels.stencil.buffers import Pairs, Step, Tile
from wsekern.kernels.stencil.geometry import Lines

Records = Shaped[Array, "_ points"] | None  # a row for each step; None without receivers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Values that are added to a field after each step, at points.

    Args:
      at: `[points, dimensions]`, the cell of each point.
      values: `[steps, points]`, what is added.
      field: the field's name or place in the pytree; by default the first.
    """

    at: Any
    values: Any
    field: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Receivers:
    """Cells of a field that are read after each step.

    Args:
      at: `[points, dimensions]`, the cell of each point.
      field: the field's name or place in the pytree; by default the first.
    """

    at: Any
    field: Any = None


# The annotations of both are not shapes: while a pytree is taken apart, other things stand there.
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("at", "values"), meta_fields=("index",)
)
@dataclasses.dataclass(frozen=True)
class Emitters:
    """Sources, checked, as a kernel takes them."""

    at: Any  # [points, dimensions], int32
    values: Any  # [steps, points]
    index: int  # of the field's leaf


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("at",), meta_fields=("index", "count")
)
@dataclasses.dataclass(frozen=True)
class Readers:
    """Receivers, checked, as a kernel takes them."""

    at: Any  # [points, dimensions], int32
    index: int  # of the field's leaf
    count: int  # points


def make_emitters(
    sources: Sources | None, fields: PyTree, lines: Lines, steps: int
) -> Emitters | None:
    """`sources` for a kernel.

    Raises:
      ValueError: a point is no cell of the field, or there are not as many values as steps.
    """
    if sources is None:
        return None
    at = _check_cells("sources", sources.at, lines)
    values = jnp.asarray(sources.values)
    if values.shape != (steps, len(at)):
        raise ValueError(
            f"stencil: sources.values is {values.shape}, and there are {steps} steps and "
            f"{len(at)} points: it must be {(steps, len(at))}"
        )
    return Emitters(jnp.asarray(at), values, _leaf_index("sources", sources.field, fields))


def make_readers(receivers: Receivers | None, fields: PyTree, lines: Lines) -> Readers | None:
    """`receivers` for a kernel.

    Raises:
      ValueError: a point is no cell of the field.
    """
    if receivers is None:
        return None
    at = _check_cells("receivers", receivers.at, lines)
    return Readers(jnp.asarray(at), _leaf_index("receivers", receivers.field, fields), len(at))


def emit(
    sources: Emitters,
    buffers: Sequence[Tile],
    lines: Lines,
    padding: Pairs,
    step: Step,
) -> list[Tile]:
    """The buffers with the sources of `step` added, in halos too.

    A PE computes some of its neighbors' cells itself, and its copies need the source as well.
    """
    out = list(buffers)
    buffer = out[sources.index]
    values = sources.values[step].astype(buffer.dtype)
    # Along a periodic dimension, a halo may hold the cell one round further: with 16 cells, cell 0
    # is also cell 16, behind cell 15.
    rounds = [
        (-line.size, 0, line.size) if line.periodic and line.split else (0,) for line in lines
    ]
    for shift in itertools.product(*rounds):
        place = _places_in_buffer(sources.at + jnp.array(shift, jnp.int32)[None], lines, padding)
        inside = jnp.all((place >= 0) & (place < jnp.array(buffer.shape)[None]), -1)
        # A negative place would count from the end; one beyond the end is dropped.
        place = jnp.where(inside[:, None], place, jnp.array(buffer.shape)[None])
        buffer = buffer.at[tuple(place.T)].add(values, mode="drop")
    out[sources.index] = buffer
    return out


def read(
    receivers: Readers, buffers: Sequence[Tile], lines: Lines, padding: Pairs
) -> Shaped[Array, " points"]:
    """What this PE's receivers read; zero for those of other PEs, so that a sum gives all."""
    buffer = buffers[receivers.index]
    place = _places_in_buffer(receivers.at, lines, padding)
    low = jnp.array([pair[0] for pair in padding])[None]
    tile = jnp.array([line.tile for line in lines])[None]
    mine: Bool[Array, " points"] = jnp.all((place >= low) & (place < low + tile), -1)
    # Of other PEs' points any cell inside the buffer will do: it is masked.
    values = buffer[tuple(jnp.where(mine[:, None], place, low).T)]
    return jnp.where(mine, values, jnp.zeros((), values.dtype))


def join_records(*parts: Records) -> Records:
    """The records of several stretches of steps, one after another."""
    arrays = [part for part in parts if part is not None]
    return jnp.concatenate(arrays) if arrays else None


def _places_in_buffer(
    cells: Int[Array, "points dims"], lines: Lines, padding: Pairs
) -> Int[Array, "points dims"]:
    """Where cells of the whole field lie in this PE's buffer; outside it for other PEs' cells."""
    begins = [
        (fabric.axis_index(line.axes) * line.tile if line.split else jnp.int32(0)) - pair[0]
        for line, pair in zip(lines, padding, strict=True)
    ]
    return cells - jnp.stack(begins)[None]


def _check_cells(option: str, at: ArrayLike | Sequence[Sequence[int]], lines: Lines) -> np.ndarray:
    cells = np.asarray(at)
    if cells.ndim != 2 or cells.shape[1] != len(lines):
        raise ValueError(
            f"stencil: {option}.at is {cells.shape}, it must be (points, {len(lines)}): a cell each"
        )
    if not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"stencil: {option}.at is {cells.dtype}; it must be whole cells")
    sizes = np.array([line.size for line in lines])
    outside = ((cells < 0) | (cells >= sizes)).any(1)
    if outside.any():
        raise ValueError(
            f"stencil: {option}.at has {tuple(cells[outside][0].tolist())}, outside the field of "
            f"{tuple(sizes.tolist())} cells"
        )
    return cells.astype(np.int32)


def _leaf_index(option: str, field: Any, fields: PyTree) -> int:
    if field is None:
        return 0
    named = geometry.option_by_field({field: True}, fields)
    if named.count(True) != 1:
        raise ValueError(f"stencil: {option}.field={field!r} names {named.count(True)} fields")
    return named.index(True)
