"""Whole arrays outside kernels: how they lie on the wafer, and what it moves to change that.

A layout is known from the specs of the kernel that made the array, and carried on from there.
Elementwise work is spread evenly over all PEs. A change of layout is charged where it costs most:
at the links across the middle of the wafer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import JaxprEqn

from wsekern.estimator.cost import Constants, Work, size_of, width_of
from wsekern.estimator.links import around_defects, loads, price
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.wafer import Wafer

Spec = tuple[tuple[str, ...], ...]  # for each dimension, the mesh axes that split it


def kernel_specs(equation: JaxprEqn, which: str) -> list[Spec]:
    """The layouts of a kernel's operands (`which="in_specs"`) or results (`which="out_specs"`)."""
    atoms: Sequence[Any] = equation.invars if which == "in_specs" else equation.outvars
    return [
        _from_partition_spec(spec, len(atom.aval.shape))
        for spec, atom in zip(equation.params[which], atoms, strict=True)
    ]


def result_layout(
    equation: JaxprEqn, operands: Sequence[Spec | None], wafer: Wafer
) -> tuple[Spec | None, list[price.PricedMove]]:
    """How the result of an equation lies (None: not known), and the moves that making it takes.

    Args:
      equation: on whole arrays.
      operands: how each operand lies.
      wafer: over which the arrays are spread.
    """
    name, params = equation.primitive.name, equation.params
    known = next((spec for spec in operands if spec is not None), None)
    if not equation.outvars:
        return None, []
    out: Any = equation.outvars[0].aval
    if name == "sharding_constraint":
        wanted = _from_partition_spec(params["sharding"].spec, len(out.shape))
        if known is None or known == wanted:
            return wanted, []
        return wanted, [relayout_move(out, wafer)]
    # An array whose layout is not known is spread evenly, and stays so.
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
        return _reduction(equation, known, wafer)
    if name == "reshape":
        return _reshape(equation, known, wafer)
    # Elementwise, or taken to be: the result lies as the first operand whose layout is known.
    if len(known) == len(out.shape):
        return known, []
    return None, []


def relayout_move(aval: Any, wafer: Wafer) -> price.PricedMove:
    """The move that lays an array out anew: half of its words cross the middle, either way."""
    assert wafer.machine is not None
    words = math.prod(aval.shape) * width_of(aval) / 4
    # As many links cross the middle as the shorter side has PEs; each carries an even share.
    side = min(wafer.height, wafer.width)
    load = words / (2 * side)
    # The farthest pair of PEs is in opposite corners; a word takes half of that way on average.
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
    """One PE's part of work on whole arrays."""
    pes = wafer.size
    # Each PE starts the instruction, however few elements it has.
    start = min(work.cycles, constants.vector_start)
    cycles = start + (work.cycles - start) / pes
    return Work(cycles, work.flops / pes, work.port_bytes / pes, work.narrow)


def part_count(spec: Spec | None, wafer: Wafer) -> int:
    """Into how many parts an array is cut; evenly over all PEs if its layout is not known."""
    if spec is None:
        return wafer.size
    return math.prod(wafer.axis_size(axis) for axes in spec for axis in axes)


def _from_partition_spec(spec: Any, ndim: int) -> Spec:
    # P("y") of a 3-dimensional array leaves out the dimensions that are not split.
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + ((),) * (ndim - len(entries))


def _reduction(equation: JaxprEqn, spec: Spec, wafer: Wafer) -> tuple[Spec, list[price.PricedMove]]:
    axes = equation.params["axes"]
    kept = tuple(entry for d, entry in enumerate(spec) if d not in axes)
    across = tuple(axis for d in axes for axis in spec[d] if axis in (ROWS, COLS))
    if not across:
        return kept, []
    # Each PE sums its own tile first, so that the tiles that move have the result's size.
    assert wafer.machine is not None
    words = size_of(equation.outvars[0]) / part_count(kept, wafer)
    sizes = _sizes(wafer)
    move = price.price_reduction("xla", across, max(words, 1.0), sizes, wafer.machine)
    if move is None:
        return kept, []
    stretched = around_defects.stretch_along_lines(
        move, across, sizes, wafer.machine, wafer.placement
    )
    return kept, [stretched]


def _sizes(wafer: Wafer) -> dict[str, int]:
    return {axis: wafer.axis_size(axis) for axis in wafer.axes}


def _reshape(
    equation: JaxprEqn, spec: Spec, wafer: Wafer
) -> tuple[Spec | None, list[price.PricedMove]]:
    """The layout after a reshape; a relayout if it touches a dimension that is split.

    Dimensions in front of those that change, and behind them, keep their layout:

      [8, 6, 4] laid out P("y", None, "x") to [8, 2, 3, 4]   stays, as P("y", None, None, "x")
      [8, 6, 4] laid out P("y", None, "x") to [48, 4]        is a relayout: 8 is split and changes
    """
    before: Any = equation.invars[0].aval
    after: Any = equation.outvars[0].aval
    old, new = before.shape, after.shape
    front = 0
    while front < min(len(old), len(new)) and old[front] == new[front]:
        front += 1
    back = 0
    while back < min(len(old), len(new)) - front and old[-1 - back] == new[-1 - back]:
        back += 1
    between = spec[front : len(old) - back]
    if any(between):
        return None, [relayout_move(after, wafer)]
    return (*spec[:front], *([()] * (len(new) - front - back)), *spec[len(old) - back :]), []
