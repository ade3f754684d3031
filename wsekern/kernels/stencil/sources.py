"""This file is single points of a field: what is added to it there, and what is read; per PE."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wsekern import fabric
from wsekern.kernels.stencil import geometry
from wsekern.kernels.stencil.geometry import Line


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Values that are added to a field after each step."""

    at: Any  # [points, dimensions], cells
    values: Any  # [steps, points]
    field: Any = None  # its name or place in the pytree; by default the first


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Receivers:
    """Cells of a field that are read after each step."""

    at: Any  # [points, dimensions], cells
    field: Any = None  # its name or place in the pytree; by default the first


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("at", "values"), meta_fields=("index",)
)
@dataclasses.dataclass(frozen=True)
class Emitters:
    """Sources as a kernel takes them."""

    at: Any
    values: Any
    index: int  # of the field's leaf


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("at",), meta_fields=("index", "count")
)
@dataclasses.dataclass(frozen=True)
class Readers:
    """Receivers as a kernel takes them."""

    at: Any
    index: int
    count: int


def make_emitters(
    sources: Sources | None, fields: Any, lines: Sequence[Line], steps: int
) -> Emitters | None:
    """`sources`, checked."""
    if sources is None:
        return None
    at = _cells("sources", sources.at, lines)
    values = jnp.asarray(sources.values)
    if values.shape != (steps, len(at)):
        raise ValueError(
            f"stencil: sources.values is {values.shape}, and there are {steps} steps and "
            f"{len(at)} points: it must be {(steps, len(at))}"
        )
    return Emitters(jnp.asarray(at), values, _index("sources", sources.field, fields))


def make_readers(receivers: Receivers | None, fields: Any, lines: Sequence[Line]) -> Readers | None:
    """`receivers`, checked."""
    if receivers is None:
        return None
    at = _cells("receivers", receivers.at, lines)
    return Readers(jnp.asarray(at), _index("receivers", receivers.field, fields), len(at))


def emit(
    sources: Emitters, buffers: Sequence[jax.Array], lines: Sequence[Line], at: Any, step: Any
) -> list[jax.Array]:
    """The buffers with the sources of `step` added, in halos too."""
    out = list(buffers)
    buffer = out[sources.index]
    values = sources.values[step].astype(buffer.dtype)
    # Of a periodic line, the cell may also lie in this PE's halo round the other way.
    rounds = [
        (-line.size, 0, line.size) if line.periodic and line.parts > 1 else (0,) for line in lines
    ]
    for by in itertools.product(*rounds):
        place = _local(sources.at + jnp.array(by, jnp.int32)[None], lines, at)
        inside = jnp.all((place >= 0) & (place < jnp.array(buffer.shape)[None]), -1)
        # What lies elsewhere is sent beyond the end, where it is dropped.
        place = jnp.where(inside[:, None], place, jnp.array(buffer.shape)[None])
        buffer = buffer.at[tuple(place.T)].add(values, mode="drop")
    out[sources.index] = buffer
    return out


def read(
    receivers: Readers, buffers: Sequence[jax.Array], lines: Sequence[Line], at: Any
) -> jax.Array:
    """What this PE's receivers read; zero for those of other PEs."""
    buffer = buffers[receivers.index]
    place = _local(receivers.at, lines, at)
    low = jnp.array([pair[0] for pair in at])[None]
    tile = jnp.array([line.tile for line in lines])[None]
    mine = jnp.all((place >= low) & (place < low + tile), -1)
    values = buffer[tuple(jnp.where(mine[:, None], place, low).T)]
    return jnp.where(mine, values, jnp.zeros((), values.dtype))


def _local(cells, lines, at):
    """The places of cells of the whole field in this PE's buffer."""
    begins = [
        (fabric.axis_index(line.names) * line.tile if line.parts > 1 else jnp.int32(0)) - pair[0]
        for line, pair in zip(lines, at, strict=True)
    ]
    return cells - jnp.stack(begins)[None]


def _cells(what: str, at: Any, lines: Sequence[Line]) -> np.ndarray:
    cells = np.asarray(at)
    if cells.ndim != 2 or cells.shape[1] != len(lines):
        raise ValueError(
            f"stencil: {what}.at is {cells.shape}, it must be (points, {len(lines)}): a cell each"
        )
    if not np.issubdtype(cells.dtype, np.integer):
        raise ValueError(f"stencil: {what}.at is {cells.dtype}; it must be whole cells")
    sizes = np.array([line.size for line in lines])
    outside = ((cells < 0) | (cells >= sizes)).any(1)
    if outside.any():
        raise ValueError(
            f"stencil: {what}.at has {tuple(cells[outside][0].tolist())}, outside the field of "
            f"{tuple(sizes.tolist())} cells"
        )
    return cells.astype(np.int32)


def _index(what: str, field: Any, fields: Any) -> int:
    if field is None:
        return 0
    chosen = geometry.by_field({field: True}, fields)
    if chosen.count(True) != 1:
        raise ValueError(f"stencil: {what}.field={field!r} names {chosen.count(True)} fields")
    return chosen.index(True)
