"""What the walk over a program knows of each of its variables."""

from __future__ import annotations

from typing import NamedTuple

from wsekern.estimator.specs import Spec


class VariableState(NamedTuple):
    """What the walk knows of a variable."""

    ready: float = 0.0  # the cycle from which its value is there
    # Whether only the PE's place and loop counters decide its value. That is known when the program
    # is put on the wafer, and costs nothing when it runs.
    static: bool = False
    from_counter: bool = False  # whether a loop counter has a part in it
    spec: Spec | None = None  # of a whole array: how it lies, if that is known
    assumed: bool = False  # whether that follows from a layout that was assumed
    line: str = ""  # of a whole array: the source line of the operation that made it
    is_view: bool = False  # whether that only described an array in another way
    true_shape: tuple[int, ...] | None = None  # of a padded array, before it was padded
    # Whether a scan stacked it, or an operation made it of such an array: it lies as the trips left
    # its rows.
    from_scan: bool = False
    # Of an array whose elements lie where they lay before a reshape: its shape and layout then.
    before: tuple[tuple[int, ...], Spec] | None = None


STATIC = VariableState(static=True)
