"""This package is what one PE can say to others: every move of data between PEs is one of these.

Per-PE functions: call them inside a kernel that `Wafer.map` runs. `along` is an axis of the grid
(`"y"`, `"x"`, `"wafer"`) or, where it says so, a tuple of them; an axis that the wafer does not
have has one PE. Meanings and gradients are the same on devices and on virtual PEs.
Costs are per PE: words received, and steps that wait for one another.

This face lists the names; `moves`, `exchange` and `collectives` define them, and each algorithm of
a reduction has a file of its own.
"""

from wsekern.fabric.collectives import all_reduce, broadcast, reduce
from wsekern.fabric.exchange import all_gather, all_to_all, gather, reduce_scatter, scatter
from wsekern.fabric.flood import flood
from wsekern.fabric.moves import (
    Along,
    Ring,
    axis_index,
    axis_size,
    ring_index,
    ring_order,
    route,
    shift,
    skew,
    transpose,
    varying,
)
from wsekern.fabric.reductions.choice import Algorithm, cheapest, predicted_cycles, received
from wsekern.fabric.reductions.operation import Op

__all__ = [
    "Algorithm",
    "Along",
    "Op",
    "Ring",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "axis_index",
    "axis_size",
    "broadcast",
    "cheapest",
    "flood",
    "gather",
    "predicted_cycles",
    "received",
    "reduce",
    "reduce_scatter",
    "ring_index",
    "ring_order",
    "route",
    "scatter",
    "shift",
    "skew",
    "transpose",
    "varying",
]
