"""How a whole array lies on the wafer: which axes of the mesh split each of its dimensions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer

Spec = tuple[tuple[str, ...], ...]  # for each dimension, the mesh axes that split it
# An instruction works through so few elements in the cycles that another one takes to start.
_FEW = 16


def from_partition_spec(spec: Any, ndim: int) -> Spec:
    # P("y") of a 3-dimensional array leaves out the dimensions that are not split.
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + ((),) * (ndim - len(entries))


def is_small(shape: Sequence[int], wafer: Wafer) -> bool:
    """Whether an array is assumed to lie whole on every PE: it has few elements, fewer than PEs."""
    return math.prod(shape) <= max(1, min(_FEW, wafer.size - 1))


def assumed_spec(shape: Sequence[int], wafer: Wafer) -> Spec:
    """How an array is assumed to lie whose layout is not known."""
    n = len(shape)
    if is_small(shape, wafer):
        return ((),) * n
    if n > 1 and shape[-2] >= wafer.height and shape[-1] >= wafer.width:
        return ((),) * (n - 2) + ((ROWS,), (COLS,))
    # Two dimensions over one axis each, the last ones first, or the longest one over both.
    pairs = reversed([*itertools.combinations(range(n), 2)])
    ways: list[dict[int, tuple[str, ...]]] = [{d: (ROWS,), e: (COLS,)} for d, e in pairs]
    ways += [{d: (ROWS, COLS)} for d in sorted(range(n), key=lambda d: -shape[d])]
    specs = [tuple(way.get(d, ()) for d in range(n)) for way in ways]
    return min(specs, key=lambda spec: math.prod(tile_of(shape, spec, wafer)))


def parts_along(axes: Sequence[str], wafer: Wafer) -> int:
    """Into how many parts a dimension is cut that is split along `axes`."""
    return math.prod(wafer.axis_size(axis) for axis in axes)


def part_count(spec: Spec | None, wafer: Wafer) -> int:
    """Into how many parts an array is cut; evenly over all PEs if its layout is not known."""
    return wafer.size if spec is None else math.prod(parts_along(axes, wafer) for axes in spec)


def tile_of(shape: Sequence[int], spec: Spec, wafer: Wafer) -> list[int]:
    """The shape of the largest tile of an array that lies as `spec` says."""
    return [-(-n // parts_along(entry, wafer)) for n, entry in zip(shape, spec, strict=True)]


def occupied_pes(n: int, axes: Sequence[str], wafer: Wafer) -> dict[str, int]:
    """PEs along each of `axes` that have a part of a dimension of `n` elements.

    100 elements along ("y", "x") of 64 x 64 PEs lie on 2 rows of 64 PEs.
    """
    left, occupied = n, {}
    for axis in reversed(axes):
        occupied[axis] = min(wafer.axis_size(axis), left)
        left = -(-left // max(1, occupied[axis]))
    return occupied


def is_transposed(spec: Spec, wanted: Spec) -> bool:
    """Whether two axes of the wafer split each other's dimensions.

    ("y", "x") and ("x", "y")          yes
    (None, ("y", "x")) and ("y", "x")  no: an array that lies in the first way may as well lie in
                                       the second one
    """
    of, to = ({axis: d for d, entry in enumerate(s) for axis in entry} for s in (spec, wanted))
    both = of.keys() & to.keys()
    return any(of[a] == to[b] != of[b] == to[a] for a, b in itertools.combinations(both, 2))


def is_coarser(spec: Spec, target: Spec) -> bool:
    """Whether every PE has, under `spec`, what it needs under `target`."""
    return all(set(a) <= set(b) for a, b in zip(spec, target, strict=True))
