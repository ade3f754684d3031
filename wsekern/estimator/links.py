"""This file is what one move of a trace costs the fabric: words on its busiest links, and hops.

Routes are dimension-ordered: along x, then along y. A link carries one word a cycle each way; the
first word of a move is there after its hops and both ramps. Reductions and floods are priced as a
whole by the model of `wsekern.fabric.cost`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wsekern.axes import COLS, ROWS, WAFERS
from wsekern.estimator.cost import width_of
from wsekern.fabric import algorithms
from wsekern.fabric.multicast import cost as flood_cost
from wsekern.hardware import Machine

DIRECTIONS = ("N", "E", "S", "W", "wafer")
_REDUCTION = re.compile(r"reduction_(.+)_(all|\d+)$")
_ALONG = {ROWS: ("S", "N"), COLS: ("E", "W"), WAFERS: ("wafer", "wafer")}
# Phases of a reduction: the chains of either level, say; of a tree, its rounds.
_PHASES = {"star": 1, "chain": 1, "snake": 1, "two_phase": 2, "k_tree": 2, "optimal": 2, "ring": 2}
_SUMS = {"psum", "psum_invariant", "pmax", "pmin"}


class Move(NamedTuple):
    """One collective of a trace, as one PE and its links meet it."""

    kind: str
    words: float  # 32-bit words that the PE receives
    busy: dict[str, float]  # cycles for which the busiest link each way is taken
    latency: float  # cycles from the last word on that link until it has arrived
    phases: int = 0  # that PEs begin together; a shift alone is one instruction
    hops: float = 0.0  # that the PE's words take, all together


def of_equation(equation: Any, sizes: dict[str, int], machine: Machine) -> Move | None:
    """The move that `equation` is; None if it is none.

    Args:
      equation: of a kernel's jaxpr.
      sizes: PEs along each axis, in the mesh's order.
      machine: whose links to count.
    """
    name, params = equation.primitive.name, equation.params
    words = sum(_words(v.aval) for v in equation.invars if hasattr(v.aval, "shape"))
    if name == "ppermute":
        return _permutation(_axes(params), params["perm"], words, sizes, machine)
    if name in _SUMS:
        return reduction("xla", _axes(params), words, sizes, machine)
    if name in ("jit", "pjit"):
        return _named(equation, sizes, machine)
    P = math.prod(sizes[a] for a in _axes(params)) if "axis_name" in params else 1
    line = functools.partial(_along_line, axes=_axes(params), sizes=sizes, machine=machine)
    if name in ("all_gather", "all_gather_invariant", "all_gather_reduced"):
        # Each tile is flooded; the link before the last PE carries all the others'.
        return line("all-gather", (P - 1) * words, (P - 1) * words)
    if name in ("reduce_scatter", "psum_scatter"):
        part = (P - 1) * words / max(P, 1)
        return line("reduce-scatter", part, part, stages=P - 1)
    if name == "all_to_all":
        # A quarter of all pairs of PEs is the most that talks across one link.
        return line("all-to-all", (P - 1) * words / max(P, 1), P * words / 4)
    return None


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
    stages: int = 0,
) -> Move | None:
    pes = math.prod(sizes[a] for a in axes)
    if pes == 1:
        return None
    far = sum(sizes[a] - 1 for a in axes) * machine.hop_cycles
    step = 2 * machine.ramp_cycles + machine.hop_cycles
    busy = {d: load for a in axes for d in _ALONG[a]}
    return Move(kind, words, busy, far + step * max(stages, 1), 1, words * pes / 3)


def _permutation(
    axes: tuple[str, ...], pairs: Any, words: float, sizes: dict[str, int], machine: Machine
) -> Move | None:
    source, to = np.array(pairs, np.int64).reshape(-1, 2).T
    if (source == to).all():
        return None
    grid = [sizes[a] for a in axes]
    loads: dict[str, float] = {}
    hops = np.zeros(len(source))
    place = dict(zip(axes, np.unravel_index(source, grid), strict=True))
    goal = dict(zip(axes, np.unravel_index(to, grid), strict=True))
    for axis in sorted(axes, key=(COLS, ROWS, WAFERS).index):
        others = [place[a] for a in axes if a != axis]  # where its route turns has moved already
        line = np.ravel_multi_index(others, [sizes[a] for a in axes if a != axis]) if others else 0
        for direction, taken in zip(
            _ALONG[axis],
            (_load(place[axis], goal[axis], line, sizes[axis]),
             _load(sizes[axis] - 1 - place[axis], sizes[axis] - 1 - goal[axis], line, sizes[axis])),
            strict=True,
        ):  # fmt: skip
            if taken:
                loads[direction] = loads.get(direction, 0) + taken * words
        hops += np.abs(goal[axis] - place[axis])
        place[axis] = goal[axis]
    latency = float(hops.max()) * machine.hop_cycles + 2 * machine.ramp_cycles + machine.hop_cycles
    return Move("shift", words, loads, latency, hops=words * float(hops.mean()))


def _load(start: np.ndarray, goal: np.ndarray, line: Any, size: int) -> int:
    """How many tiles cross the busiest link towards higher places, over all lines."""
    up = goal > start
    if not up.any():
        return 0
    lines = np.broadcast_to(line, start.shape)[up]
    crossing = np.zeros((int(lines.max()) + 1, size + 1), np.int64)
    np.add.at(crossing, (lines, start[up]), 1)
    np.add.at(crossing, (lines, goal[up]), -1)
    return int(crossing.cumsum(1).max())


def _named(equation: Any, sizes: dict[str, int], machine: Machine) -> Move | None:
    """The flood or the reduction that a call is known by."""
    name = str(equation.params["name"])
    of_reduction = _REDUCTION.match(name)
    if name != "flood" and of_reduction is None:
        return None
    axes = _axes_within(equation.params["jaxpr"].jaxpr)
    words = _words(equation.outvars[0].aval)
    if of_reduction is None:
        return _flood(axes, words, sizes, machine)
    algorithm, root = of_reduction.groups()
    return reduction(algorithm, axes, words, sizes, machine, None if root == "all" else int(root))


def _flood(
    axes: tuple[str, ...], words: float, sizes: dict[str, int], machine: Machine
) -> Move | None:
    lengths = [sizes[a] for a in axes if sizes[a] > 1]
    if not lengths:
        return None
    cycles = flood_cost(*_two(lengths), words).cycles(machine)
    busy = {d: words for a in axes for d in _ALONG[a]}
    return Move("flood", words, busy, cycles - words, 1, words * (math.prod(lengths) - 1))


def reduction(
    algorithm: str,
    axes: tuple[str, ...],
    words: float,
    sizes: dict[str, int],
    machine: Machine,
    root: int | None = None,
) -> Move | None:
    lengths = [sizes[a] for a in axes if sizes[a] > 1]
    if not lengths:
        return None
    if algorithm == "xla":
        algorithm, _ = algorithms.cheapest(lengths, words, machine, root)
    cycles = algorithms.predicted_cycles(algorithm, lengths, words, machine, root)
    # Words that go into the PE that takes most of them, and out again where all need the sum.
    load = min(cycles, words * (2 if root is None else 1))
    if algorithm == "tree":
        phases = sum(math.ceil(math.log2(n)) for n in lengths)
    else:
        phases = _PHASES[algorithm] * len(lengths)
    return Move(
        kind=f"reduce by {algorithm}",
        words=load,
        busy={d: load for a in axes for d in _ALONG[a]},
        latency=cycles - load,
        phases=phases + (root is None),
        hops=words * (math.prod(lengths) - 1) / math.prod(lengths) * (1 + (root is None)),
    )


def _two(lengths: Sequence[int]) -> tuple[int, int]:
    return (1, lengths[0]) if len(lengths) == 1 else (lengths[0], math.prod(lengths[1:]))


def _axes_within(jaxpr: Any) -> tuple[str, ...]:
    """The axes along which anything moves in a call, in the order first met."""
    found: dict[str, None] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in (*_SUMS, "ppermute"):
            found |= dict.fromkeys(_axes(equation.params))
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found |= dict.fromkeys(_axes_within(inner))
    return tuple(found)
