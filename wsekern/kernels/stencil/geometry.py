"""A field's dimensions as PEs hold them, and what the user says of them: boundaries and widths.

Each dimension is cut into tiles of one size. The last tile that holds any cell may hold fewer.
Beyond the two ends of a dimension lies what its boundaries say.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from wsekern import fabric
from wsekern.wafer.axes import axes_of

# What lies beyond an end: a rule by name, a number, or a function of the cells nearest to the end.
Boundary = str | float | Callable[[Shaped[Array, "..."]], Shaped[Array, "..."]]
# `boundary.ghost_cells` fills each of them; `halo_exchange` lists them for users.
RULES = ("periodic", "zero", "edge", "reflect", "symmetric", "fixed")
Width = int | tuple[int, int]
Axes = None | str | tuple[str, ...]  # over which axes of the grid one dimension is split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One dimension of a field."""

    axes: tuple[str, ...]  # the axes that it is split over, outermost first
    pes: int  # PEs along them
    tile: int  # cells that a PE has room for
    size: int  # cells of the whole
    low: Boundary
    high: Boundary

    @property
    def last_pe(self) -> int:
        """The place of the PE that holds the last cell."""
        return (self.size - 1) // self.tile

    @property
    def last_cells(self) -> int:
        """How many cells that PE holds."""
        return self.size - self.last_pe * self.tile

    @property
    def split(self) -> bool:
        return self.pes > 1

    @property
    def periodic(self) -> bool:
        return self.low == "periodic"

    def ends(self) -> tuple[Boundary, Boundary]:
        return self.low, self.high

    def for_coefficient(self) -> "Line":
        """This dimension of a coefficient: periodic as the field, else its last cell repeats."""
        rule = "periodic" if self.periodic else "edge"
        return dataclasses.replace(self, low=rule, high=rule)


Lines = tuple[Line, ...]  # the dimensions of one field


def field_lines(
    shape: Sequence[int],
    along: Sequence[Axes],
    boundary: Any,
    pes: Sequence[int],
    operation: str,
) -> Lines:
    """The dimensions of a field of `shape`, each split over its entry of `along` into `pes`."""
    sides = boundary_pairs(boundary, len(shape), operation)
    return tuple(
        Line(
            axes=axes_of(entry),
            pes=count,
            tile=-(-size // count),  # rounded up: the last tiles may hold fewer cells, or none
            size=size,
            low=low,
            high=high,
        )
        for size, entry, count, (low, high) in zip(shape, along, pes, sides, strict=True)
    )


def pes_along(along: Sequence[Axes]) -> tuple[int, ...]:
    """How many PEs each dimension is split over; inside a kernel or a `shard_map`."""
    return tuple(fabric.axis_size(entry) if entry else 1 for entry in along)


def boundary_pairs(
    boundary: Any, ndim: int, operation: str
) -> tuple[tuple[Boundary, Boundary], ...]:
    """The boundaries of each dimension's two ends, from one for all or one for each dimension."""
    if not isinstance(boundary, list | tuple):
        boundary = (boundary,) * ndim
    if len(boundary) != ndim:
        raise ValueError(
            f"{operation}: boundary has {len(boundary)} entries, the field {ndim} dimensions; give "
            "one for all, or one for each, which may be a pair (low, high)"
        )
    sides = []
    for dim, entry in enumerate(boundary):
        pair = tuple(entry) if isinstance(entry, list | tuple) else (entry, entry)
        if len(pair) != 2:
            raise ValueError(
                f"{operation}: boundary of dimension {dim} is {entry}, not (low, high)"
            )
        low, high = (_boundary_rule(side, operation) for side in pair)
        # What leaves at one end of a ring enters at the other.
        if (low == "periodic") != (high == "periodic"):
            raise ValueError(
                f"{operation}: boundary of dimension {dim} is {pair}: a line is periodic at both "
                "ends or at none"
            )
        sides.append((low, high))
    return tuple(sides)


def option_by_field(option: Any, fields: PyTree) -> list[Any]:
    """`option` for each leaf of `fields`: a dict by the leaf's name or place, or one for all."""
    names = field_names(fields)
    if not isinstance(option, dict):
        return [option] * len(names)
    for key in option:
        if key not in names:
            raise ValueError(f"stencil: {key!r} is not one of the fields {names}")
    return [option.get(name) for name in names]


def field_names(fields: PyTree) -> list[Any]:
    """The name, or the place, of each leaf of `fields`."""
    return [_top_key(path) for path, _ in jax.tree_util.tree_flatten_with_path(fields)[0]]


def width_pairs(
    width: Any, along: Sequence[Axes], operation: str, name: str
) -> tuple[tuple[int, int], ...]:
    """Low and high width for each dimension, from one for all that are split, or one for each."""
    if not isinstance(width, list | tuple):
        split = [entry is not None for entry in along]
        # On one PE no dimension is split, so nothing says which have a halo: all of them do.
        width = [width if has_axes or not any(split) else 0 for has_axes in split]
    if len(width) != len(along):
        raise ValueError(
            f"{operation}: {name} has {len(width)} entries, the field {len(along)} dimensions"
        )
    pairs = [tuple(w) if isinstance(w, list | tuple) else (w, w) for w in width]
    for dim, pair in enumerate(pairs):
        whole = all(isinstance(w, int | np.integer) and w >= 0 for w in pair)
        if len(pair) != 2 or not whole:
            raise ValueError(
                f"{operation}: {name} of dimension {dim} is {pair}; it must be cells, 0 or more, "
                "or a pair (low, high) of them"
            )
    return tuple((int(low), int(high)) for low, high in pairs)


def _boundary_rule(side: Any, operation: str) -> Boundary:
    if isinstance(side, str) and side in RULES:
        return 0.0 if side == "zero" else side
    if callable(side):
        return side
    if isinstance(side, int | float | np.number) and not isinstance(side, bool):
        return float(side)
    raise ValueError(
        f"{operation}: boundary {side!r} is not one of {RULES}, a number, or a function"
    )


def _top_key(path: tuple[Any, ...]) -> Any:
    if not path:
        return 0
    # Dicts have keys, named tuples and dataclasses names, lists indices.
    for attribute in ("key", "name", "idx"):
        if hasattr(path[0], attribute):
            return getattr(path[0], attribute)
    return path[0]
