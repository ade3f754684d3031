"""Moves of data between PEs: every kernel communicates through these functions alone.

They are per-PE functions: call them inside a kernel that `Wafer.map` runs. `along` is an axis of
the grid, `"y"`, `"x"` or `"wafer"`; some functions take a tuple of axes. An axis that the wafer
does not have has one PE. Meanings and gradients are the same on devices and on virtual PEs.

- Where am I: `axis_index`, `axis_size`, `ring_index`, `ring_order`.
- One tile to one other PE: `shift`, `skew`, `route`, `transpose`.
- One PE to all, or all to one: `broadcast`, `flood`, `scatter`, `reduce`, `gather`.
- All to all: `all_reduce`, `all_gather`, `ring_all_gather`, `reduce_scatter`, `all_to_all`.
- Types and costs: `varying`; `cheapest`, `predicted_cycles`, `received`.

Costs are per PE: words of 32 bits received, and steps that wait for one another.
"""

from wsekern.fabric.collectives import all_reduce, broadcast, reduce
from wsekern.fabric.exchange import (
    all_gather,
    all_to_all,
    gather,
    reduce_scatter,
    ring_all_gather,
    scatter,
)
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
    "ring_all_gather",
    "ring_index",
    "ring_order",
    "route",
    "scatter",
    "shift",
    "skew",
    "transpose",
    "varying",
]
