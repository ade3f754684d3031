"""This file is how the dimensions of a field lie on PEs: split over which axes, ended by what.

A dimension is a line of cells. It is cut into tiles of one size, of which the last that holds any
cell may hold fewer; beyond the line's two ends lies what its boundaries say.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from wsekern import fabric
from wsekern.wafer import context, on_devices
from wsekern.wafer.axes import COLS, ROWS, WAFERS, axes_of
from wsekern.wafer.wafer import Wafer, wafer_of_sharding

# What lies beyond an end: a rule by name, a number, or a function of the cells nearest to the end.
Boundary = str | float | Callable[[jax.Array], jax.Array]
RULES = ("periodic", "zero", "edge", "reflect", "symmetric", "fixed")
Width = int | tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One dimension of a field."""

    names: tuple[str, ...]  # the axes that it is split over, outermost first
    parts: int  # PEs along them
    tile: int  # cells that a PE has room for
    size: int  # cells of the whole
    low: Boundary
    high: Boundary

    @property
    def last(self) -> int:
        """The place of the PE that holds the last cell."""
        return (self.size - 1) // self.tile

    @property
    def rest(self) -> int:
        """How many cells that PE holds."""
        return self.size - self.last * self.tile

    @property
    def periodic(self) -> bool:
        return self.low == "periodic"

    def beside(self) -> "Line":
        """The line of what is known at the same cells and does not change."""
        rule = "periodic" if self.periodic else "edge"
        return dataclasses.replace(self, low=rule, high=rule)


def of_field(
    shape: Sequence[int],
    along: Sequence[None | str | tuple[str, ...]],
    boundary: Any,
    parts: Sequence[int],
    what: str,
) -> tuple[Line, ...]:
    """The lines of a whole field of `shape`, split over the axes `along` into `parts`."""
    sides = boundaries(boundary, len(shape), what)
    return tuple(
        Line(
            names=axes_of(entry),
            parts=count,
            tile=-(-size // count),
            size=size,
            low=low,
            high=high,
        )
        for size, entry, count, (low, high) in zip(shape, along, parts, sides, strict=True)
    )


def parts_along(along: Sequence[None | str | tuple[str, ...]]) -> tuple[int, ...]:
    """How many PEs each dimension is split over; inside a kernel or a `shard_map`."""
    return tuple(fabric.axis_size(entry) if entry else 1 for entry in along)


def boundaries(boundary: Any, ndim: int, what: str) -> tuple[tuple[Boundary, Boundary], ...]:
    """The boundaries of each dimension's two ends, from one for all or one for each dimension."""
    if not isinstance(boundary, list | tuple):
        boundary = (boundary,) * ndim
    if len(boundary) != ndim:
        raise ValueError(
            f"{what}: boundary has {len(boundary)} entries, the field {ndim} dimensions; give one "
            "for all, or one for each, which may be a pair (low, high)"
        )
    sides = []
    for dim, entry in enumerate(boundary):
        pair = tuple(entry) if isinstance(entry, list | tuple) else (entry, entry)
        if len(pair) != 2:
            raise ValueError(f"{what}: boundary of dimension {dim} is {entry}, not (low, high)")
        low, high = (_rule(side, what) for side in pair)
        if (low == "periodic") != (high == "periodic"):
            raise ValueError(
                f"{what}: boundary of dimension {dim} is {pair}: a line is periodic at both ends "
                "or at none"
            )
        sides.append((low, high))
    return tuple(sides)


def by_field(option: Any, fields: Any) -> list[Any]:
    """`option` for each leaf of `fields`: a dict by the leaf's name or place, or one for all."""
    names = field_names(fields)
    if not isinstance(option, dict):
        return [option] * len(names)
    for key in option:
        if key not in names:
            raise ValueError(f"stencil: {key!r} is not one of the fields {names}")
    return [option.get(name) for name in names]


def field_names(fields: Any) -> list[Any]:
    """What each leaf of `fields` is called."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(fields)[0]]


def widths(width: Any, along: Sequence, what: str, name: str) -> tuple[tuple[int, int], ...]:
    """Low and high width for each dimension, from one for all that are split, or one for each."""
    if not isinstance(width, list | tuple):
        split = [entry is not None for entry in along]
        # A whole field on one PE has no axes to tell by: then one width is for all dimensions.
        width = [width if own or not any(split) else 0 for own in split]
    if len(width) != len(along):
        raise ValueError(
            f"{what}: {name} has {len(width)} entries, the field {len(along)} dimensions"
        )
    pairs = [tuple(w) if isinstance(w, list | tuple) else (w, w) for w in width]
    for dim, pair in enumerate(pairs):
        whole = all(isinstance(w, int | np.integer) and w >= 0 for w in pair)
        if len(pair) != 2 or not whole:
            raise ValueError(
                f"{what}: {name} of dimension {dim} is {pair}; it must be cells, 0 or more, or a "
                "pair (low, high) of them"
            )
    return tuple((int(low), int(high)) for low, high in pairs)


def home(
    fields: Any, spec: P | None, wafer: Wafer | None
) -> tuple[Wafer | None, tuple[None | str | tuple[str, ...], ...]]:
    """On which wafer `fields` are computed, if on any, and over which axes each dimension lies.

    Without a wafer given or entered, the mesh that the first field is split over is one.
    """
    first = jax.tree.leaves(fields)[0]
    laid = on_devices.named_sharding(first)
    wafer = context.current() if wafer is None else wafer
    if wafer is None and laid is not None and laid.mesh.size > 1:
        wafer = wafer_of_sharding(laid)
    given = spec
    if spec is None and wafer is not None and laid is not None and laid.mesh == wafer.mesh:
        spec = on_devices.spec_in_wafer_axes(laid.spec, wafer)
    wafer = context.resolve(wafer)
    if spec is None or not any(spec):
        spec = _default(first.ndim, wafer) if given is None else P()
    entries = (*spec, *[None] * (first.ndim - len(spec)))
    return wafer, tuple(_plain(entry) for entry in entries)


def _rule(side: Any, what: str) -> Boundary:
    if isinstance(side, str):
        if side not in RULES:
            raise ValueError(
                f"{what}: boundary {side!r} is not one of {RULES}, a number, or a function"
            )
        return 0.0 if side == "zero" else side
    if callable(side):
        return side
    if isinstance(side, bool) or not isinstance(side, int | float | np.number):
        raise ValueError(
            f"{what}: boundary {side!r} is not one of {RULES}, a number, or a function"
        )
    return float(side)


def _name(path: tuple) -> Any:
    """What a leaf is called at the top of its pytree."""
    if not path:
        return 0
    key = path[0]
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _plain(entry: Any) -> None | str | tuple[str, ...]:
    names = axes_of(entry)
    return None if not names else names[0] if len(names) == 1 else names


def _default(ndim: int, wafer: Wafer | None) -> P:
    """The first dimension along y and over the wafers, the second along x."""
    several = wafer is not None and wafer.wafers > 1
    if ndim == 1:
        return P((WAFERS, ROWS, COLS)) if several else P((ROWS, COLS))
    return P((WAFERS, ROWS), COLS) if several else P(ROWS, COLS)
