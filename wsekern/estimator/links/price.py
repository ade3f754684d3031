"""The cost of one move on the fabric: words on its busiest links, hops, and latency.

Routes are dimension-ordered: along x, then along y. A link carries one word a cycle each way; the
first word of a move arrives after its hops and both ramps. Reductions and floods are priced as a
whole, by the models of `wsekern.fabric.reductions.cost` and `wsekern.fabric.flood`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn

from wsekern.estimator import trace
from wsekern.estimator.cost import width_of
from wsekern.estimator.links import loads
from wsekern.fabric.flood import cost as flood_cost
from wsekern.fabric.reductions import choice
from wsekern.hardware import Machine
from wsekern.wafer.axes import AXES, COLS, ROWS, WAFERS

# The fabric names its reductions so in the trace: "reduction_chain_0", "reduction_k_tree_all".
_REDUCTION = re.compile(r"reduction_(.+)_(all|\d+)$")
# The links that a move both ways along an axis takes.
_ALONG = {ROWS: ("S", "N"), COLS: ("E", "W"), WAFERS: ("wafer", "wafer")}
# What all PEs of a line begin together, by algorithm: the chains of each level, for example. A
# tree has one phase a round, which depends on the line's length.
_PHASES = {"star": 1, "chain": 1, "snake": 1, "two_phase": 2, "k_tree": 2, "optimal": 2, "ring": 2}
# The kind of LinkPattern, by the kind of move.
_PATTERNS = {"all-gather": "gather", "reduce-scatter": "scatter", "all-to-all": "exchange"}
_SUMS = {"psum", "psum_invariant", "pmax", "pmin"}


class PricedMove(NamedTuple):
    """One collective of a trace, as it costs one PE and its links."""

    kind: str  # "shift", "flood", "reduce by ...", "all-gather", ... as the timeline names it
    words: float  # 32-bit words that the PE receives
    busy: dict[str, float]  # words on the busiest link in each direction
    latency: float  # cycles from the last word on that link until it has arrived
    phases: int = 0  # that PEs begin together; a shift is one instruction, and has none
    hops: float = 0.0  # hops that the PE's words take, added up
    tile: float = 0.0  # words that a PE hands in
    pattern: loads.LinkPattern | None = None  # the links that it crosses; None: none of a wafer


def price_move(equation: JaxprEqn, sizes: dict[str, int], machine: Machine) -> PricedMove | None:
    """The cost of an equation that moves tiles; None for any other equation.

    Args:
      equation: of a kernel's jaxpr.
      sizes: PEs along each axis, in the mesh's order.
      machine: says what a hop and a ramp cost.
    """
    name, params = equation.primitive.name, equation.params
    words = sum(_words(v.aval) for v in equation.invars if hasattr(v.aval, "shape"))
    if name == "ppermute":
        return _permutation(_axes(params), params["perm"], words, sizes, machine)
    if name in _SUMS:
        return price_reduction("xla", _axes(params), words, sizes, machine)
    if name in ("jit", "pjit"):
        return _price_by_name(equation, sizes, machine)
    if name not in trace.MOVES:
        return None
    P = math.prod(sizes[a] for a in _axes(params))
    line = functools.partial(
        _along_line, axes=_axes(params), sizes=sizes, machine=machine, tile=words
    )
    if name in ("all_gather", "all_gather_invariant", "all_gather_reduced"):
        # Each tile is flooded; the link before the last PE carries those of all others.
        return line("all-gather", (P - 1) * words, (P - 1) * words)
    if name in ("reduce_scatter", "psum_scatter"):
        part = (P - 1) * words / max(P, 1)
        return line("reduce-scatter", part, part, stages=P - 1)
    if name == "all_to_all":
        # The middle link carries the parts from half of the PEs to the other half: P/2 * P/2 parts
        # of words / P each.
        return line("all-to-all", (P - 1) * words / max(P, 1), P * words / 4)
    return None


def axes_of(equation: JaxprEqn) -> tuple[str, ...]:
    """The axes along which the collective `equation` moves."""
    inner = equation.params.get("jaxpr")
    return _axes_within(inner.jaxpr) if inner is not None else _axes(equation.params)


def root_of(equation: JaxprEqn) -> int | None:
    """The number of the PE that gets the result of a reduction; None if all do."""
    match = _REDUCTION.match(str(equation.params.get("name", "")))
    return None if match is None or match[2] == "all" else int(match[2])


def _axes(params: dict[str, Any]) -> tuple[str, ...]:
    axes = params.get("axes") or params.get("axis_name") or ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _words(aval: Any) -> float:
    return math.prod(aval.shape) * width_of(aval) / 4


def _along_line(
    kind: str,
    words: float,
    load: float,
    axes: Sequence[str],
    sizes: dict[str, int],
    machine: Machine,
    tile: float,
    stages: int = 0,
) -> PricedMove | None:
    pes = math.prod(sizes[a] for a in axes)
    if pes == 1:
        return None
    # A flood pays the ramps once. Each of several stages ends in a PE, which sends on.
    far = sum(sizes[a] - 1 for a in axes) * machine.hop_cycles
    step = 2 * machine.ramp_cycles + machine.hop_cycles
    busy = {d: load for a in axes for d in _ALONG[a]}
    pattern = loads.LinkPattern(kind=_PATTERNS[kind], axes=tuple(axes))
    latency = far + step * max(stages, 1)
    # The mean distance of two PEs on a line is a third of its length.
    return PricedMove(kind, words, busy, latency, 1, words * pes / 3, tile, pattern)


def _permutation(
    axes: tuple[str, ...], pairs: Any, words: float, sizes: dict[str, int], machine: Machine
) -> PricedMove | None:
    source, to = np.array(pairs, np.int64).reshape(-1, 2).T
    if (source == to).all():
        return None
    # A tile crosses links of several axes, and directions of one axis load different links; only
    # the busiest link in each direction takes time.
    most, pattern = loads.permutation_loads(axes, sizes, source, to)
    busy: dict[str, float] = {}
    for direction, tiles in most:
        busy[direction] = busy.get(direction, 0) + tiles * words
    grid = [sizes[a] for a in axes]
    steps = zip(np.unravel_index(source, grid), np.unravel_index(to, grid), strict=True)
    hops = sum(np.abs(goal - place) for place, goal in steps)
    latency = float(hops.max()) * machine.hop_cycles + 2 * machine.ramp_cycles + machine.hop_cycles
    traveled = words * float(hops.mean())
    return PricedMove("shift", words, busy, latency, hops=traveled, tile=words, pattern=pattern)


def price_shift(
    axis: str, by: int, words: float, sizes: dict[str, int], machine: Machine
) -> PricedMove:
    """A shift of tiles by `by` PEs along an axis; what leaves at an edge does not come back.

    Args:
      axis: one axis.
      by: how far, toward higher indices if positive; not zero.
      words: words of a tile.
      sizes: PEs along each axis, in the mesh's order.
      machine: says what a hop and a ramp cost.
    """
    pairs = [(i, i + by) for i in range(sizes[axis]) if 0 <= i + by < sizes[axis]]
    move = _permutation((axis,), pairs, words, sizes, machine)
    assert move is not None
    return move


def _price_by_name(
    equation: JaxprEqn, sizes: dict[str, int], machine: Machine
) -> PricedMove | None:
    """The flood or the reduction that a jitted call is, by its name; None for any other call.

    The call holds the steps that devices take instead: XLA has neither of the two.
    """
    name = str(equation.params["name"])
    match = _REDUCTION.match(name)
    if name != "flood" and match is None:
        return None
    axes = _axes_within(equation.params["jaxpr"].jaxpr)
    words = _words(equation.outvars[0].aval)
    if match is None:
        return price_flood(axes, words, sizes, machine)
    algorithm, root = match.groups()
    return price_reduction(
        algorithm, axes, words, sizes, machine, None if root == "all" else int(root)
    )


def price_flood(
    axes: tuple[str, ...], words: float, sizes: dict[str, int], machine: Machine
) -> PricedMove | None:
    """A tile that one PE sends to all others along `axes`; None if there are no others.

    Args:
      axes: along which it goes.
      words: words of the tile.
      sizes: PEs along each axis.
      machine: says what a hop and a ramp cost.
    """
    lengths = [sizes[a] for a in axes if sizes[a] > 1]
    if not lengths:
        return None
    cycles = flood_cost(*_two(lengths), words).cycles(machine)
    busy = {d: words for a in axes for d in _ALONG[a]}
    hops = words * (math.prod(lengths) - 1)
    pattern = loads.LinkPattern(kind="flood", axes=axes)
    return PricedMove("flood", words, busy, cycles - words, 1, hops, words, pattern)


def price_reduction(
    algorithm: str,
    axes: tuple[str, ...],
    words: float,
    sizes: dict[str, int],
    machine: Machine,
    root: int | None = None,
) -> PricedMove | None:
    """A reduction, and the flood back if every PE needs its result; None on a single PE.

    Args:
      algorithm: one of `wsekern.fabric.reductions.choice`, or "xla": the cheapest of them.
      axes: along which tiles are reduced, as the call names them.
      words: words of a tile.
      sizes: PEs along each axis.
      machine: says what a hop and a ramp cost.
      root: the number of the PE that gets the result; None: all PEs do.
    """
    lengths = [sizes[a] for a in axes if sizes[a] > 1]
    if not lengths:
        return None
    if algorithm == "xla":
        algorithm, _ = choice.cheapest(lengths, words, machine, root)
    cycles = choice.predicted_cycles(algorithm, lengths, words, machine, root)
    # The model gives cycles in all. Of these, links are taken for a tile into the root, and for
    # another one out again if all PEs need the result; the others are latency.
    load = min(cycles, words * (2 if root is None else 1))
    if algorithm == "tree":
        phases = sum(math.ceil(math.log2(n)) for n in lengths)
    else:
        phases = _PHASES[algorithm] * len(lengths)
    return PricedMove(
        kind=f"reduce by {algorithm}",
        words=load,
        busy={d: load for a in axes for d in _ALONG[a]},
        latency=cycles - load,
        phases=phases + (root is None),
        hops=words * (math.prod(lengths) - 1) / math.prod(lengths) * (1 + (root is None)),
        tile=words,
        pattern=loads.LinkPattern(
            kind=algorithm,
            axes=_by_number(axes),
            root=root,
            words=words if algorithm == "optimal" else 0.0,
        ),
    )


def _by_number(axes: Sequence[str]) -> tuple[str, ...]:
    """Axes in the mesh's order, in which the fabric's callers name them and number the root."""
    return tuple(sorted(axes, key=AXES.index))


def _two(lengths: Sequence[int]) -> tuple[int, int]:
    return (1, lengths[0]) if len(lengths) == 1 else (lengths[0], math.prod(lengths[1:]))


def _axes_within(jaxpr: Any) -> tuple[str, ...]:
    """The axes along which anything moves in a call, in the order of their first use."""
    axes: dict[str, None] = {}  # a set that keeps its order
    for equation in jaxpr.eqns:
        if equation.primitive.name in (*_SUMS, "ppermute"):
            axes |= dict.fromkeys(_axes(equation.params))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    axes |= dict.fromkeys(_axes_within(inner))
    return tuple(axes)
