"""How much of its memory a PE needs: live ranges of tiles over a program.

Views of a tile take nothing. The result of an elementwise operation takes the place of an operand
that is not needed any more, and so does what a loop carries. A received tile has a place of its own
beside the tile that was sent for it, which stays until the received one is first used. What only
the PE's place decides is part of its program, not of its data. Operands of a program stay to its
end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.estimator import cost, layouts, trace
from wsekern.estimator.contractions import StandIn
from wsekern.estimator.cost import size_of, width_of
from wsekern.estimator.specs import Spec, part_count
from wsekern.wafer.wafer import Wafer

_IN_PLACE = cost.ELEMENTWISE | {"dynamic_update_slice", "scatter", "scatter-add", "scan", "while"}
_ARGUMENT = "argument"
_Specs = dict[Any, Spec | None]  # how whole arrays lie, by variable


class LiveArray(NamedTuple):
    """An array that a PE, or a chip, holds when its memory is fullest."""

    bytes: float  # its part of the array
    shape: tuple[int, ...]  # of the array; inside a kernel of the PE's tile
    dtype: str
    made_by: str  # "dot_general"; "argument"
    line: str  # "model.py:12"; "" for an argument


class _Peak(NamedTuple):
    bytes: float
    live: tuple[LiveArray, ...] = ()  # at that moment; empty unless they are recorded


def high_water(jaxpr: Jaxpr, wafer: Wafer, stand_ins: Mapping[int, StandIn] | None = None) -> float:
    """The most bytes of a PE's memory that a program takes at a time.

    Args:
      jaxpr: about whole arrays.
      wafer: over which these are spread.
      stand_ins: the programs of its contractions, by their equations' ids.
    """
    beside = {key: _bytes_beside(s) for key, s in (stand_ins or {}).items()}
    walk = _LiveRanges(wafer, beside, records=False)
    return walk.peak(jaxpr, [False] * len(jaxpr.invars), (), in_kernel=False).bytes


def live_at_peak(
    jaxpr: Jaxpr, wafer: Wafer, argument_bytes: Sequence[float]
) -> tuple[LiveArray, ...]:
    """The arrays that a PE holds when its memory is fullest, largest first.

    Args:
      jaxpr: about whole arrays.
      wafer: over which these are spread.
      argument_bytes: bytes of a PE's part of each argument.
    """
    walk = _LiveRanges(wafer, {}, records=True)
    walk.known = dict(zip(jaxpr.invars, argument_bytes, strict=True))
    live = walk.peak(jaxpr, [False] * len(jaxpr.invars), (), in_kernel=False).live
    return tuple(sorted(live, key=lambda array: -array.bytes))


def _bytes_beside(stand_in: StandIn) -> float:
    """Bytes of a PE that a contraction's program takes beside its factors and its result."""
    jaxpr, wafer = stand_in.jaxpr, stand_in.region
    own = sum(_bytes(v, None, wafer, in_kernel=False) for v in (*jaxpr.invars, *jaxpr.outvars))
    return max(0.0, high_water(jaxpr, wafer) - own)


class _LiveRanges:
    """Walks a program and keeps track of what lives."""

    def __init__(self, wafer: Wafer, beside: Mapping[int, float], records: bool) -> None:
        """A walk over programs on `wafer`.

        Args:
          wafer: over which whole arrays are spread.
          beside: bytes that equations take beside operands and results, by their ids.
          records: whether to keep the arrays that live at the peak.
        """
        self.wafer, self.beside, self.records = wafer, beside, records
        self.known: dict[Any, float] = {}  # bytes of variables whose layout is known otherwise

    def peak(
        self,
        jaxpr: Jaxpr,
        static_ins: Sequence[bool],
        owned: Collection[Any],
        in_kernel: bool,
    ) -> _Peak:
        """The most bytes at a time, operands among them.

        Args:
          jaxpr: about a PE's tiles if `in_kernel`, else about whole arrays.
          static_ins: whether each operand is part of the PE's program, and takes no memory.
          owned: operands whose memory the jaxpr may reuse; the others stay to the end.
          in_kernel: whether the jaxpr is a kernel's.
        """
        # Constants of a kernel are part of its program; those of a whole program are arrays.
        static: dict[Any, bool] = dict.fromkeys(jaxpr.constvars, in_kernel)
        static |= dict(zip(jaxpr.invars, static_ins, strict=True))
        specs: _Specs = {}
        fusions = cost.find_fusions(jaxpr)
        home = _homes(jaxpr)
        last = _last_uses(jaxpr, home, owned)
        size: dict[Any, float] = {
            v: 0.0 if static[v] else _bytes(v, specs.get(v), self.wafer, in_kernel)
            for v in (*jaxpr.invars, *jaxpr.constvars)
        } | self.known
        self.known = {}  # of the outermost program alone
        maker: dict[Any, JaxprEqn] = {}
        live = sum(size.values())
        most = _Peak(live, self._named(size, maker))
        used = trace.used_equations(jaxpr)
        for place, equation in enumerate(jaxpr.eqns):
            if place not in used:
                static |= dict.fromkeys(equation.outvars, True)
                continue
            ins = [trace.is_literal(v) or static[v] for v in equation.invars]
            _note(equation, ins, static, specs, in_kernel)
            # A product that the next sum takes in is never stored.
            new = {
                v: _bytes(v, specs.get(v), self.wafer, in_kernel)
                for v in equation.outvars
                if home[v] is v and not static[v] and v not in fusions.products
            }
            dying = {
                home[v]
                for v in equation.invars
                if not trace.is_literal(v) and last.get(home[v]) == place
            }
            # x * 2.0, where nothing reads x afterwards, is written over x: the result is fresh
            # memory only as far as it is larger than the operands that die.
            fresh = sum(new.values())
            if equation.primitive.name in _IN_PLACE or place in fusions.sums:
                fresh = max(0.0, fresh - sum(size.get(v, 0.0) for v in dying))
            inner = self._inner(equation, ins, in_kernel)
            maker |= dict.fromkeys(new, equation)
            if live + fresh + inner.bytes > most.bytes:
                # Of what is written over operands, those stand for both.
                held = size | new if fresh == sum(new.values()) else size
                most = _Peak(live + fresh + inner.bytes, inner.live + self._named(held, maker))
            live += sum(new.values()) - sum(size.pop(v, 0.0) for v in dying)
            size |= new
            # Of several results of one equation, some may have no reader.
            unused = [v for v in new if last.get(v, -1) <= place]
            live -= sum(size.pop(v) for v in unused)
        return most

    def _inner(self, equation: JaxprEqn, ins: list[bool], in_kernel: bool) -> _Peak:
        """What the jaxprs called by an equation take beside its operands and results."""
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            branches = [getattr(branch, "jaxpr", branch) for branch in params["branches"]]
            peaks = [self._peak_beside(branch, ins[1:], (), in_kernel) for branch in branches]
            return max(peaks, key=lambda peak: peak.bytes)
        if name == "while":
            body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
            skip = params["cond_nconsts"]
            carried = body.invars[params["body_nconsts"] :]
            return self._peak_beside(body, ins[skip:], carried, in_kernel)
        inner = trace.inner_jaxpr(params)
        if inner is None:
            return _Peak(self.beside.get(id(equation), 0.0))
        ins = trace.inner_operands(equation, ins)
        if name == "scan":
            parts = trace.scan_parts(equation)
            carried = inner.invars[parts.consts : parts.consts + parts.carry]
            return self._peak_beside(inner, ins, carried, in_kernel)
        return self._peak_beside(inner, ins, (), in_kernel or name == "shard_map")

    def _peak_beside(
        self, jaxpr: Jaxpr, static_ins: Sequence[bool], owned: Collection[Any], in_kernel: bool
    ) -> _Peak:
        """`peak`, less the operands and results, which the caller counts."""
        outs = [v for v in jaxpr.outvars if not trace.is_literal(v)]
        static = dict(zip(jaxpr.invars, static_ins, strict=True))
        whole = self.peak(jaxpr, static_ins, owned, in_kernel)

        def sum_of(variables: Collection[Any]) -> float:
            return sum(_bytes(v, None, self.wafer, in_kernel) for v in variables)

        operands = sum_of([v for v in jaxpr.invars if not static[v]])
        # What a loop carries out lies where it was carried in, and is counted there.
        results = 0.0 if owned else sum_of(set(outs) - set(static))
        made = tuple(array for array in whole.live if array.made_by != _ARGUMENT)
        return _Peak(max(0.0, whole.bytes - operands - results), made)

    def _named(
        self, size: Mapping[Any, float], maker: Mapping[Any, JaxprEqn]
    ) -> tuple[LiveArray, ...]:
        if not self.records:
            return ()
        named = []
        for v, count in size.items():
            equation = maker.get(v)
            made_by, line = _ARGUMENT, ""
            if equation is not None:
                made_by = equation.primitive.name
                source = trace.line_of(equation)
                line = source.user or source.library
            shape = tuple(getattr(v.aval, "shape", ()))
            named.append(LiveArray(count, shape, str(getattr(v.aval, "dtype", "")), made_by, line))
        return tuple(named)


def _homes(jaxpr: Jaxpr) -> dict[Any, Any]:
    """The variable in whose memory each variable lies: itself, or the tile that it is a view of."""
    home: dict[Any, Any] = {v: v for v in (*jaxpr.invars, *jaxpr.constvars)}
    for equation in jaxpr.eqns:
        tiles = [v for v in equation.invars if not trace.is_literal(v)]
        name = equation.primitive.name
        for v in equation.outvars:
            home[v] = v
        # A barrier hands on all its operands, any other view only its first.
        if name in cost.VIEWS and tiles:
            home[equation.outvars[0]] = home[tiles[0]]
            if name == "optimization_barrier":
                home |= {o: home[t] for o, t in zip(equation.outvars, tiles, strict=True)}
    return home


def _last_uses(jaxpr: Jaxpr, home: dict[Any, Any], owned: Collection[Any]) -> dict[Any, int]:
    """The place of the last equation that needs each tile; the end for tiles that must stay.

    A tile that was sent is needed until the received one is first used: only then is it certain
    that all its words have left. For

      0  b = ppermute a
      1  c = mul d 2
      2  e = add b c

    a lives until 2, although nothing reads it after 0.
    """
    last: dict[Any, int] = {}
    sent: dict[Any, list[Any]] = {}  # the tiles that were sent, by the received one
    for place, equation in enumerate(jaxpr.eqns):
        for v in equation.invars:
            if trace.is_literal(v):
                continue
            last[home[v]] = place
            for other in sent.pop(home[v], ()):
                last[other] = max(last.get(other, 0), place)
        if equation.primitive.name == "ppermute":
            for v, received in zip(equation.invars, equation.outvars, strict=True):
                sent[received] = [home[v]]
    end = len(jaxpr.eqns)
    kept = {home[v] for v in jaxpr.outvars if not trace.is_literal(v)}
    kept |= {v for v in (*jaxpr.invars, *jaxpr.constvars) if v not in owned}
    return last | dict.fromkeys(kept, end)


def _note(
    equation: JaxprEqn,
    ins: Sequence[bool],
    static: dict[Any, bool],
    specs: _Specs,
    in_kernel: bool,
) -> None:
    """Notes in `static` and `specs` what is known of the variables of an equation."""
    name = equation.primitive.name
    # A loop's results are taken as data. That its counter is not costs a word at most.
    fixed = in_kernel and all(ins) and name not in trace.MOVES and name not in ("scan", "while")
    static |= dict.fromkeys(equation.outvars, fixed)
    if not in_kernel and name == "shard_map":
        out_specs = layouts.kernel_specs(equation, "out_specs")
        specs |= dict(zip(equation.outvars, out_specs, strict=True))
        operands = zip(equation.invars, layouts.kernel_specs(equation, "in_specs"), strict=True)
        specs |= {v: s for v, s in operands if not trace.is_literal(v) and v not in specs}


def _bytes(v: Any, spec: Spec | None, wafer: Wafer, in_kernel: bool) -> float:
    if not hasattr(v.aval, "shape"):
        return 0.0
    size = size_of(v) * width_of(v.aval)
    return float(size) if in_kernel else math.ceil(size / part_count(spec, wafer))
