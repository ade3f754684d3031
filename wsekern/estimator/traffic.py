"""This file is what a program sends: words and steps of one PE, counted in the traced program.

A move is one collective of the trace. A step is a move that waits for another: moves that depend on
nothing of one another are one step, whatever their number. Counted as every kernel's docstring
counts, in 32-bit words that reach the PE that receives most: all of a tile that is shifted or
flooded, and of the collectives that XLA and the fabric share the least that their result takes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from wsekern.estimator import trace
from wsekern.wafer.wafer import Wafer

# What a PE receives of a collective over P PEs, in words of the tile that it hands in.
_RECEIVED: dict[str, tuple[str, Callable[[int], float]]] = {
    "ppermute": ("shift", lambda P: 1),
    "all_gather": ("all-gather", lambda P: P - 1),
    "all_gather_invariant": ("all-gather", lambda P: P - 1),
    "all_gather_reduced": ("all-gather", lambda P: P - 1),
    "reduce_scatter": ("reduce-scatter", lambda P: (P - 1) / P),
    "all_to_all": ("all-to-all", lambda P: (P - 1) / P),
    # As a reduce-scatter and an all-gather, the least that an all-reduce can receive.
    "psum": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "psum_invariant": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "pmax": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "pmin": ("all-reduce", lambda P: 2 * (P - 1) / P),
}
_FLOOD = "flood"  # the name of fabric's one-to-all move, which is an all-reduce on devices alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one PE receives while a program runs once, and how often it waits."""

    words: float  # 32-bit words that reach the PE
    steps: int  # the longest chain of moves of which each waits for the one before
    moves: int  # collectives that run
    words_by_move: dict[str, float]  # `words`, by the kind of move that brings them

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {words:,.0f}" for kind, words in self.words_by_move.items())
        total = f"{self.words:,.0f} words a PE in {self.steps:,} steps, {self.moves:,} moves"
        return f"{total} ({kinds})" if kinds else total


def traffic(function: Callable, *operands: Any, wafer: Wafer | None = None) -> Traffic:
    """What one PE receives while `function(*operands)` runs, off its trace; nothing is computed.

    A virtual wafer is read as the abstract one of its size. Both branches of a `cond` are read, and
    the one that receives more is counted. Moves that XLA adds outside `Wafer.map` to change a
    layout are not in a trace, and not counted.

    Args:
      function: what to run; any jax function whose kernels go through `Wafer.map`.
      operands: arrays or `jax.ShapeDtypeStruct`s; pytrees of them.
      wafer: the current wafer in `function`; by default the one in force.

    Raises:
      ValueError: there is no wafer, or a move stands in a loop whose length the trace does not say.
    """
    jaxpr, _ = trace.traced("traffic", function, operands, wafer)
    read = _read(jaxpr, [0] * len(jaxpr.invars), {})
    return Traffic(
        words=sum(read.words.values()),
        steps=read.steps,
        moves=read.moves,
        words_by_move=dict(read.words),
    )


class _Reading(NamedTuple):
    """Of a jaxpr: after how many steps each result is there, and what was received."""

    outs: list[int]
    steps: int
    moves: int
    words: collections.Counter

    def plus(self, other: _Reading, times: int = 1) -> _Reading:
        words = collections.Counter(self.words)
        for kind, received in other.words.items():
            words[kind] += times * received
        steps = max(self.steps, other.steps)
        return _Reading(other.outs, steps, self.moves + times * other.moves, words)


_NOTHING = _Reading([], 0, 0, collections.Counter())


def _read(jaxpr: Any, ins: Sequence[int], sizes: dict[str, int]) -> _Reading:
    """The reading of `jaxpr` whose operands are there after `ins` steps."""
    ready = dict.fromkeys(jaxpr.constvars, 0) | dict(zip(jaxpr.invars, ins, strict=True))

    def step_of(atom: Any) -> int:
        return 0 if trace.is_literal(atom) else ready[atom]

    total = _NOTHING
    for equation in jaxpr.eqns:
        new = _read_equation(equation, [step_of(v) for v in equation.invars], sizes)
        total = total.plus(new)
        ready.update(zip(equation.outvars, new.outs, strict=True))
    return total._replace(outs=[step_of(v) for v in jaxpr.outvars])


def _read_equation(equation: Any, ins: list[int], sizes: dict[str, int]) -> _Reading:
    name, params = equation.primitive.name, equation.params
    if name in _RECEIVED:
        return _move(equation, *_RECEIVED[name], ins, sizes)
    if name in ("jit", "pjit") and params["name"] == _FLOOD:
        return _move(equation, "flood", lambda P: 1, ins, sizes)
    if name == "scan":
        return _scan(equation, ins, sizes)
    if name == "while":
        return _while(params, ins, sizes)
    if name == "cond":
        return _cond(params, ins, sizes)
    if name == "shard_map":
        sizes = sizes | dict(params["mesh"].shape)
    inner = trace.called(params)
    if inner is not None:
        return _read(inner, trace.handed(equation, ins), sizes)
    return _NOTHING._replace(outs=[max(ins, default=0)] * len(equation.outvars))


def _move(
    equation: Any,
    kind: str,
    received: Callable[[int], float],
    ins: list[int],
    sizes: dict[str, int],
) -> _Reading:
    params = equation.params
    if kind == "flood":
        P = 2  # however many: the tile arrives once
    else:
        axes = params.get("axes") or params["axis_name"]
        axes = (axes,) if isinstance(axes, str) else axes
        P = math.prod(sizes[axis] for axis in axes)
    stays = P == 1 or all(a == b for a, b in params.get("perm", ((0, 1),)))
    step = max(ins, default=0) + (not stays)
    outs = [step] * len(equation.outvars)
    if stays:
        return _NOTHING._replace(outs=outs)
    tiles = equation.outvars if kind == "flood" else equation.invars
    words = sum(received(P) * _words(tile.aval) for tile in tiles)
    return _Reading(outs, step, 1, collections.Counter({kind: words}))


def _words(aval: Any) -> float:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize / 4


def _cond(params: dict[str, Any], ins: list[int], sizes: dict[str, int]) -> _Reading:
    known = [max(step, ins[0]) for step in ins[1:]]  # which branch it is, first of all
    branches = [
        _read(getattr(branch, "jaxpr", branch), known, sizes) for branch in params["branches"]
    ]
    most = max(branches, key=lambda branch: sum(branch.words.values()))
    outs = [max(steps) for steps in zip(*(branch.outs for branch in branches), strict=True)]
    return most._replace(outs=outs)


def _scan(equation: Any, ins: list[int], sizes: dict[str, int]) -> _Reading:
    body, length, consts, carry = trace.loop_of(equation)
    held, carried, xs = ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
    last, steps, ys = _NOTHING, 0, [0] * (len(body.outvars) - carry)
    for _ in range(length):
        last = _read(body, [*held, *carried, *xs], sizes)
        now = last.outs[:carry]
        ys = [max(a, b) for a, b in zip(ys, last.outs[carry:], strict=True)]
        steps = max(steps, last.steps)
        if now == carried:  # so it stays
            break
        carried = now
    whole = _NOTHING.plus(last, length)
    return whole._replace(outs=[*carried, *ys], steps=steps)


def _while(params: dict[str, Any], ins: list[int], sizes: dict[str, int]) -> _Reading:
    body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
    start = params["cond_nconsts"]
    if _read(body, ins[start:], sizes).moves:
        raise ValueError(
            "traffic: a move stands in a while loop, whose length the trace does not say; use "
            "lax.scan or lax.fori_loop with a fixed length"
        )
    return _NOTHING._replace(outs=[max(ins)] * len(body.outvars))
