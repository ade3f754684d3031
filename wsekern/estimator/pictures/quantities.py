"""The quantities of an estimate that a map of a wafer can show, PE by PE.

All PEs run the same program: what they hold, compute and read from memory is the same on each.
Their links carry different loads, so that the busy time of each PE's busiest resource differs too.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from wsekern.estimator.result import Estimate

SAME = "the same on each PE"
_NAMES = ("load", "N", "E", "S", "W", "busy", "sram")
# What a map assumes because a trace does not say it, by kind of move; see
# `wsekern.estimator.links.loads`.
_ASSUMED = {"flood": "floods from all PEs in turn", "relayout": "new layouts as even traffic"}
_TOWARDS = {"N": "north", "E": "east", "S": "south", "W": "west"}


class Quantity(NamedTuple):
    """Values by PE, with their title and unit."""

    values: np.ndarray  # [height, width]
    title: str
    unit: str
    top: float | None = None  # the value at which the colors end; None: the largest
    note: str = ""


def quantity_of(source: Any, quantity: str = "load", label: str = "") -> Quantity:
    """The values of a map.

    Args:
      source: an estimate, or values by PE, `[height, width]`.
      quantity: for an estimate. "load": words on each PE's busiest outgoing link. "N", "E", "S" or
        "W": words on its link in that direction. "busy": cycles for which its engine or busiest
        link is busy. "sram": bytes of data at most.
      label: the title of an array's values.

    Raises:
      ValueError: an array does not have two dimensions, or there is no such quantity.
    """
    if not hasattr(source, "link_words"):
        values = np.asarray(source, float)
        if values.ndim != 2 or not values.size:
            raise ValueError(
                f"wafer_map: values of shape {values.shape} are not [height, width]; give an "
                "estimate or one value for each PE"
            )
        return Quantity(values, label or "value", "")
    check_quantity(quantity)
    return _of_estimate(source, quantity)


def on_wafer(source: Any, shown: Quantity) -> Quantity:
    """The values at their PEs' physical places; faulty and spare PEs are blank."""
    placement = getattr(getattr(source, "wafer", None), "placement", None)
    if placement is None:
        return shown
    values = np.full(placement.physical, np.nan)
    values[placement.rows, placement.columns] = shown.values
    note = f"{placement.faulty:,} faulty PEs and the spare ones blank"
    return shown._replace(values=values, note="; ".join(filter(None, (shown.note, note))))


def extent(source: Any) -> tuple[int, int, int, int] | None:
    """The (y0, y1, x0, x1) rows and columns of a program with a placement; None: the whole map."""
    placement = getattr(getattr(source, "wafer", None), "placement", None)
    if placement is None:
        return None
    rows, columns = placement.rows, placement.columns
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


def check_quantity(quantity: str) -> None:
    """Returns if an estimate has this quantity.

    Raises:
      ValueError: it has not; the message has the nearest name.
    """
    if quantity not in _NAMES:
        near = difflib.get_close_matches(quantity, _NAMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"take one of {', '.join(_NAMES)}"
        raise ValueError(f"wafer_map: there is no quantity {quantity!r}; {hint}")


def _of_estimate(e: Estimate, quantity: str) -> Quantity:
    shape = (e.wafer.height, e.wafer.width)
    if quantity == "sram":
        values = np.full(shape, e.sram_per_pe)
        note = f"{e.sram_per_pe:,.0f} of {e.sram_free:,.0f} bytes, {SAME}"
        return Quantity(values, "data in memory", "bytes", max(e.sram_free, e.sram_per_pe), note)
    words = e.link_words()
    kinds = {pattern.kind for pattern, _ in e.tiles if pattern.root is None}
    notes = [note for kind, note in _ASSUMED.items() if kind in kinds]
    if quantity in words:
        title = f"words {_TOWARDS[quantity]}"
        return Quantity(words[quantity], title, "words", note="; ".join(notes))
    most = np.max(list(words.values()), axis=0)
    if quantity == "load":
        title = "words on the busiest link of each PE"
        return Quantity(most, title, "words", note="; ".join(notes))
    busy = np.maximum(e.busy["compute"], most * 4 / e.machine.link_bytes_per_cycle)
    note = f"engine {e.busy['compute']:,.0f} cycles, {SAME}"
    return Quantity(busy, "busy time of each PE", "cycles", max(e.cycles, busy.max()), note)
