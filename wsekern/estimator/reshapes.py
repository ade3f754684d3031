"""How an array lies after a reshape: which dimensions may be merged and split where they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wsekern.estimator.specs import Spec, parts_along
from wsekern.wafer.wafer import Wafer


def spec_after_reshape(
    old: Sequence[int], new: Sequence[int], spec: Spec, wafer: Wafer
) -> Spec | None:
    """The layout of a reshaped array; None if elements must go to other PEs.

    Dimensions that stay keep their layout, and so does the first of those that are merged or split,
    if a PE keeps its elements:

      [8, 6, 4] laid out P("y", None, "x") to [8, 2, 3, 4]   stays, as P("y", None, None, "x")
      [8, 6, 4] laid out P("y", None, None) to [48, 4]       stays, as P("y", None)
      [8, 6, 4] laid out P(None, "y", None) to [48, 4]       does not: 6 is split inside of 48

    Args:
      old: the shape before.
      new: the shape afterwards.
      spec: how the array lay before.
      wafer: over which it is spread.
    """
    after: list[tuple[str, ...]] = [()] * len(new)
    for before, behind in _groups(old, new):
        split = [d for d in before if spec[d]]
        if not split:
            continue
        long = [d for d in before if old[d] > 1]
        if len(split) > 1 or (long and split[0] != long[0]):
            return None
        to = next((d for d in behind if new[d] > 1), behind[0] if behind else None)
        parts = parts_along(spec[split[0]], wafer)
        if to is None or _tile(old, before, split[0], parts) != _tile(new, behind, to, parts):
            return None
        after[to] = spec[split[0]]
    return tuple(after)


def _tile(shape: Sequence[int], dims: Sequence[int], split: int, parts: int) -> int:
    """Elements of a PE, of dimensions of which one is cut into parts."""
    return math.prod(-(-shape[d] // parts) if d == split else shape[d] for d in dims)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions of two shapes that hold the same elements.

    [8, 6, 4] and [48, 4]: dimensions 0 and 1 of the old shape are 0 of the new, and 2 is 1.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        before: list[int] = []
        behind: list[int] = []
        size_before = size_behind = 1
        while True:
            if i < len(old) and (size_before < size_behind or not before):
                before.append(i)
                size_before, i = size_before * old[i], i + 1
            elif j < len(new) and (size_behind < size_before or not behind):
                behind.append(j)
                size_behind, j = size_behind * new[j], j + 1
            else:
                break
        groups.append((before, behind))
    return groups
