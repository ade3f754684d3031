"""This file is what happens to whole arrays outside kernels: how they lie, and what that moves.

Layouts are carried on from the specs of the kernels that made them. Elementwise work is spread
evenly over all PEs; a change of layout crosses the middle of the wafer, and is charged there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from wsekern.estimator.cost import Constants, Work, size_of, width_of
from wsekern.estimator.links import around_defects, loads, price
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer

Spec = tuple[tuple[str, ...], ...]  # the axes that each dimension is split over


def kernel_specs(equation: Any, which: str) -> list[Spec]:
    """The layouts of a kernel's operands (`in_specs`) or of its results (`out_specs`)."""
    atoms = equation.invars if which == "in_specs" else equation.outvars
    return [
        _of_partition(spec, len(atom.aval.shape))
        for spec, atom in zip(equation.params[which], atoms, strict=True)
    ]


def result_layout(
    equation: Any, given: Sequence[Spec | None], wafer: Wafer
) -> tuple[Spec | None, list[price.PricedMove]]:
    """How the result lies, and the moves that making it causes."""
    name, params = equation.primitive.name, equation.params
    known = next((spec for spec in given if spec is not None), None)
    if not equation.outvars:
        return None, []
    out = equation.outvars[0].aval
    if name == "sharding_constraint":
        wanted = _of_partition(params["sharding"].spec, len(out.shape))
        if known is None or known == wanted:
            return wanted, []
        return wanted, [relayout_move(out, wafer)]
    if known is None:
        return None, []
    if name == "transpose":
        return tuple(known[d] for d in params["permutation"]), []
    if name == "broadcast_in_dim":
        spec: list[tuple[str, ...]] = [()] * len(out.shape)
        for d, to in enumerate(params["broadcast_dimensions"]):
            spec[to] = known[d]
        return tuple(spec), []
    if name.startswith("reduce_") and "axes" in params:
        return _reduced(equation, known, wafer)
    if name == "reshape":
        return _reshaped(equation, known, wafer)
    if len(known) == len(out.shape):
        return known, []
    return None, []


def relayout_move(aval: Any, wafer: Wafer) -> price.PricedMove:
    """An array laid out anew: half of its words cross the middle of the wafer, either way."""
    assert wafer.machine is not None
    words = math.prod(aval.shape) * width_of(aval) / 4
    side = min(wafer.height, wafer.width)
    load = words / (2 * side)
    far = (wafer.height + wafer.width - 2) * wafer.machine.hop_cycles
    move = price.PricedMove(
        "relayout",
        words / (wafer.height * wafer.width),
        {direction: load for direction in "NESW"},
        far + 2 * wafer.machine.ramp_cycles + 1,
        hops=words / (wafer.height * wafer.width) * far / 2,
        tile=load,
        pattern=loads.LinkPattern(kind="relayout"),
    )
    return around_defects.stretch_along_lines(
        move, (ROWS, COLS), _sizes(wafer), wafer.machine, wafer.placement
    )


def spread_evenly(work: Work, wafer: Wafer, constants: Constants) -> Work:
    """One PE's part of work on whole arrays, evenly spread."""
    pes = wafer.size
    start = min(work.cycles, constants.vector_start)
    cycles = start + (work.cycles - start) / pes
    return Work(cycles, work.flops / pes, work.port_bytes / pes, work.narrow)


def part_count(spec: Spec | None, wafer: Wafer) -> int:
    """Into how many parts an array is cut; evenly over all PEs where its layout is not known."""
    if spec is None:
        return wafer.size
    return math.prod(wafer.axis_size(axis) for axes in spec for axis in axes)


def _of_partition(spec: Any, ndim: int) -> Spec:
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + ((),) * (ndim - len(entries))


def _reduced(equation: Any, spec: Spec, wafer: Wafer) -> tuple[Spec, list[price.PricedMove]]:
    axes = equation.params["axes"]
    kept = tuple(entry for d, entry in enumerate(spec) if d not in axes)
    across = tuple(axis for d in axes for axis in spec[d] if axis in (ROWS, COLS))
    if not across:
        return kept, []
    assert wafer.machine is not None
    words = size_of(equation.outvars[0]) / part_count(kept, wafer)
    sizes = _sizes(wafer)
    move = price.price_reduction("xla", across, max(words, 1.0), sizes, wafer.machine)
    if move is None:
        return kept, []
    return kept, [
        around_defects.stretch_along_lines(move, across, sizes, wafer.machine, wafer.placement)
    ]


def _sizes(wafer: Wafer) -> dict[str, int]:
    return {axis: wafer.axis_size(axis) for axis in wafer.axes}


def _reshaped(
    equation: Any, spec: Spec, wafer: Wafer
) -> tuple[Spec | None, list[price.PricedMove]]:
    """Dimensions before and behind those that change keep their layout."""
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    front = 0
    while front < min(len(old), len(new)) and old[front] == new[front]:
        front += 1
    back = 0
    while back < min(len(old), len(new)) - front and old[-1 - back] == new[-1 - back]:
        back += 1
    between = spec[front : len(old) - back]
    if any(between):
        return None, [relayout_move(equation.outvars[0].aval, wafer)]
    return (*spec[:front], *([()] * (len(new) - front - back)), *spec[len(old) - back :]), []
