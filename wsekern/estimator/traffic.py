"""The words that one PE receives while a program runs, and how often it waits: `wk.traffic`.

Both are counted in the trace. A move is one collective. A step is a move that waits for another:
moves that do not depend on one another are one step, however many they are. Words are 32-bit and
those of the PE that receives most, as in every kernel's docstring: the whole tile of a shift or a
flood, and for collectives that XLA and the fabric divide among PEs the least that their result
takes.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.estimator import report, trace
from wsekern.wafer.wafer import Wafer

# What a PE receives in a collective over P PEs, for each word of the tile that it hands in.
_RECEIVED: dict[str, tuple[str, Callable[[int], float]]] = {
    "ppermute": ("shift", lambda P: 1),
    "all_gather": ("all-gather", lambda P: P - 1),
    "all_gather_invariant": ("all-gather", lambda P: P - 1),
    "all_gather_reduced": ("all-gather", lambda P: P - 1),
    "reduce_scatter": ("reduce-scatter", lambda P: (P - 1) / P),
    "all_to_all": ("all-to-all", lambda P: (P - 1) / P),
    # A reduce-scatter and an all-gather: no all-reduce receives less.
    "psum": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "psum_invariant": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "pmax": ("all-reduce", lambda P: 2 * (P - 1) / P),
    "pmin": ("all-reduce", lambda P: 2 * (P - 1) / P),
}
# The name of the fabric's one-to-all move. On devices it is an all-reduce, since XLA has no flood;
# its name is how a trace tells it from a real one.
_FLOOD = "flood"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one PE receives while a program runs once, as `wk.traffic` returns it; `print` it.

    A notebook shows it as a table.
    """

    words: float  # 32-bit words that reach the PE
    steps: int  # moves in the longest chain in which each waits for the one before
    moves: int  # collectives that run
    words_by_move: dict[str, float]  # `words`, by the kind of move that brings them

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {words:,.0f}" for kind, words in self.words_by_move.items())
        total = f"{self.words:,.0f} words a PE in {self.steps:,} steps, {self.moves:,} moves"
        return f"{total} ({kinds})" if kinds else total

    def _repr_html_(self) -> str:
        rows = [("words a PE", f"{self.words:,.0f}"), ("steps", f"{self.steps:,}")]
        rows.append(("moves", f"{self.moves:,}"))
        kinds = [(f"{kind}, words", f"{n:,.0f}") for kind, n in self.words_by_move.items()]
        return report.html_table(rows + kinds)


def traffic(function: Callable, *operands: Any, wafer: Wafer | None = None) -> Traffic:
    """The words that one PE receives in `function(*operands)`, and its steps; nothing is computed.

    Words are 32-bit and those of the PE that receives most. A move is one collective; a step is a
    move that waits for another, so that independent moves are one step. The function is traced on
    an abstract wafer, a virtual wafer as the abstract one of its size. Both branches of a
    `lax.cond` are read, and the one that receives more counts. Moves that XLA adds outside
    `Wafer.map` to change a layout are not in a trace, and are not counted.

    Args:
      function: any function that JAX can trace and whose kernels go through `Wafer.map`.
      operands: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them.
      wafer: the wafer to trace on; by default the one in force (`with wafer:`).

    Raises:
      ValueError: there is no wafer, or a `lax.while_loop` moves something: the trace does not say
        how often it runs.
    """
    jaxpr, _ = trace.trace_program("traffic", function, operands, wafer)
    count = _count(jaxpr, [0] * len(jaxpr.invars), {})
    return Traffic(
        words=sum(count.words.values()),
        steps=count.steps,
        moves=count.moves,
        words_by_move=dict(count.words),
    )


class _Count(NamedTuple):
    """What was counted in a jaxpr or an equation."""

    outs: list[int]  # the step after which each result is there
    steps: int
    moves: int
    words: collections.Counter

    def plus(self, other: _Count, times: int = 1) -> _Count:
        """Both counts together, `other` so many times; with the results of `other`."""
        words = collections.Counter(self.words)
        for kind, received in other.words.items():
            words[kind] += times * received
        steps = max(self.steps, other.steps)
        return _Count(other.outs, steps, self.moves + times * other.moves, words)


_NOTHING = _Count([], 0, 0, collections.Counter())


def _count(jaxpr: Jaxpr, ins: Sequence[int], sizes: dict[str, int]) -> _Count:
    """The count of `jaxpr`, whose operands are there after `ins` steps."""
    ready: dict[Any, int] = dict.fromkeys(jaxpr.constvars, 0)
    ready |= dict(zip(jaxpr.invars, ins, strict=True))

    def step_of(atom: Any) -> int:
        return 0 if trace.is_literal(atom) else ready[atom]

    total = _NOTHING
    for equation in jaxpr.eqns:
        new = _count_equation(equation, [step_of(v) for v in equation.invars], sizes)
        total = total.plus(new)
        ready.update(zip(equation.outvars, new.outs, strict=True))
    return total._replace(outs=[step_of(v) for v in jaxpr.outvars])


def _count_equation(equation: JaxprEqn, ins: list[int], sizes: dict[str, int]) -> _Count:
    name, params = equation.primitive.name, equation.params
    if name in _RECEIVED:
        return _count_move(equation, *_RECEIVED[name], ins, sizes)
    if name in ("jit", "pjit") and params["name"] == _FLOOD:
        return _count_move(equation, "flood", lambda P: 1, ins, sizes)
    if name == "scan":
        return _count_scan(equation, ins, sizes)
    if name == "while":
        return _count_while(params, ins, sizes)
    if name == "cond":
        return _count_cond(params, ins, sizes)
    if name == "shard_map":
        sizes = sizes | dict(params["mesh"].shape)
    inner = trace.inner_jaxpr(params)
    if inner is not None:
        return _count(inner, trace.inner_operands(equation, ins), sizes)
    return _NOTHING._replace(outs=[max(ins, default=0)] * len(equation.outvars))


def _count_move(
    equation: JaxprEqn,
    kind: str,
    received: Callable[[int], float],
    ins: list[int],
    sizes: dict[str, int],
) -> _Count:
    params = equation.params
    if kind == "flood":
        P = 2  # any number above 1: the tile arrives once, however many PEs there are
    else:
        axes = params.get("axes") or params["axis_name"]
        axes = (axes,) if isinstance(axes, str) else axes
        P = math.prod(sizes[axis] for axis in axes)
    # A shift by the whole axis sends every tile to where it is.
    stays = P == 1 or all(a == b for a, b in params.get("perm", ((0, 1),)))
    step = max(ins, default=0) + (not stays)
    outs = [step] * len(equation.outvars)
    if stays:
        return _NOTHING._replace(outs=outs)
    # A flood is a call, whose operands are the root's tile and whatever else it reads.
    tiles: Sequence[Any] = equation.outvars if kind == "flood" else equation.invars
    words = sum(received(P) * _words(tile.aval) for tile in tiles)
    return _Count(outs, step, 1, collections.Counter({kind: words}))


def _words(aval: Any) -> float:
    return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize / 4


def _count_cond(params: dict[str, Any], ins: list[int], sizes: dict[str, int]) -> _Count:
    # No branch starts before it is known which, which the first operand says.
    known = [max(step, ins[0]) for step in ins[1:]]
    branches = [
        _count(getattr(branch, "jaxpr", branch), known, sizes) for branch in params["branches"]
    ]
    most = max(branches, key=lambda branch: sum(branch.words.values()))
    outs = [max(steps) for steps in zip(*(branch.outs for branch in branches), strict=True)]
    return most._replace(outs=outs)


def _count_scan(equation: JaxprEqn, ins: list[int], sizes: dict[str, int]) -> _Count:
    body, length, consts, carry = trace.scan_parts(equation)
    constants, carried, scanned = ins[:consts], ins[consts : consts + carry], ins[consts + carry :]
    last, steps, stacked = _NOTHING, 0, [0] * (len(body.outvars) - carry)
    # A trip adds to the chain only what passes through the carry:
    #   carry -> shift(carry, "x")                 adds a step each trip
    #   total -> total + shift(constant, "y")      adds one step in all, in the first trip
    # Once a trip leaves the carry's steps as they were, so do all that follow.
    for _ in range(length):
        last = _count(body, [*constants, *carried, *scanned], sizes)
        new = last.outs[:carry]
        stacked = [max(a, b) for a, b in zip(stacked, last.outs[carry:], strict=True)]
        steps = max(steps, last.steps)
        if new == carried:
            break
        carried = new
    whole = _NOTHING.plus(last, length)
    return whole._replace(outs=[*carried, *stacked], steps=steps)


def _count_while(params: dict[str, Any], ins: list[int], sizes: dict[str, int]) -> _Count:
    body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
    start = params["cond_nconsts"]
    if _count(body, ins[start:], sizes).moves:
        raise ValueError(
            "traffic: a move stands in a while loop, whose length the trace does not say; use "
            "lax.scan or lax.fori_loop with a fixed length"
        )
    return _NOTHING._replace(outs=[max(ins)] * len(body.outvars))
