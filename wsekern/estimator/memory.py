"""This file is how much of its memory a PE needs: live ranges of tiles over a program.

Views of a tile take nothing. The result of an elementwise operation takes the place of an operand
that is not needed any more, and so does what a loop carries. What a PE receives has a place of its
own beside the tile that it sends, which stays until the other is first used. What nothing but a
PE's place decides is in its program, not in its memory; a program's operands stay to its end.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from wsekern.estimator import cost, relayout, trace
from wsekern.estimator.cost import size_of, width_of
from wsekern.wafer.wafer import Wafer

_IN_PLACE = cost.ELEMENTWISE | {"dynamic_update_slice", "scatter", "scatter-add", "scan", "while"}


def high_water(jaxpr: Any, wafer: Wafer) -> float:
    """The most bytes of a PE's memory that a program takes at a time."""
    return _peak(jaxpr, [False] * len(jaxpr.invars), (), wafer, within=False)


def _peak(
    jaxpr: Any, flags: Sequence[bool], owned: Collection[Any], wafer: Wafer, within: bool
) -> float:
    """The most bytes at a time, operands among them; those not `owned` stay to the end."""
    placed = dict.fromkeys(jaxpr.constvars, within)
    placed |= dict(zip(jaxpr.invars, flags, strict=True))
    specs: dict[Any, relayout.Spec | None] = {}
    fusions = cost.find_fusions(jaxpr)
    home = _homes(jaxpr, placed)
    last = _last_uses(jaxpr, home, owned)
    size: dict[Any, float] = {
        v: 0.0 if placed[v] else _bytes(v, specs.get(v), wafer, within)
        for v in (*jaxpr.invars, *jaxpr.constvars)
    }
    most = live = sum(size.values())
    live_places = trace.used_equations(jaxpr)
    for place, equation in enumerate(jaxpr.eqns):
        if place not in live_places:
            placed |= dict.fromkeys(equation.outvars, True)
            continue
        given = [trace.is_literal(v) or placed[v] for v in equation.invars]
        _note(equation, given, placed, specs, within)
        new = {
            v: _bytes(v, specs.get(v), wafer, within)
            for v in equation.outvars
            if home[v] is v and not placed[v] and v not in fusions.products
        }
        dying = {
            home[v]
            for v in equation.invars
            if not trace.is_literal(v) and last.get(home[v]) == place
        }
        fresh = sum(new.values())
        if equation.primitive.name in _IN_PLACE or place in fusions.sums:
            fresh = max(0.0, fresh - sum(size.get(v, 0.0) for v in dying))
        inner = _within(equation, given, wafer, within)
        most = max(most, live + fresh + inner)
        live += sum(new.values()) - sum(size.pop(v, 0.0) for v in dying)
        size |= new
        unused = [v for v in new if last.get(v, -1) <= place]
        live -= sum(size.pop(v) for v in unused)
    return most


def _within(equation: Any, given: list[bool], wafer: Wafer, within: bool) -> float:
    """What an equation that calls others takes at most, beside its operands and results."""
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        branches = [getattr(branch, "jaxpr", branch) for branch in params["branches"]]
        return max(_beside(branch, given[1:], (), wafer, within) for branch in branches)
    if name == "while":
        body = getattr(params["body_jaxpr"], "jaxpr", params["body_jaxpr"])
        skip = params["cond_nconsts"]
        carried = body.invars[params["body_nconsts"] :]
        return _beside(body, given[skip:], carried, wafer, within)
    inner = trace.inner_jaxpr(params)
    if inner is None:
        return 0.0
    given = trace.inner_operands(equation, given)
    if name == "scan":
        loop = trace.scan_parts(equation)
        carried = inner.invars[loop.consts : loop.consts + loop.carry]
        return _beside(inner, given, carried, wafer, within)
    return _beside(inner, given, (), wafer, within or name == "shard_map")


def _beside(jaxpr, given, owned, wafer, within) -> float:
    outs = [v for v in jaxpr.outvars if not trace.is_literal(v)]
    flags = dict(zip(jaxpr.invars, given, strict=True))
    whole_peak = _peak(jaxpr, given, owned, wafer, within)
    operands = sum(_bytes(v, None, wafer, within) for v in jaxpr.invars if not flags[v])
    # Results are counted where the call is, once; carried ones take the operands' places.
    results = 0.0 if owned else sum(_bytes(v, None, wafer, within) for v in set(outs) - set(flags))
    return max(0.0, whole_peak - operands - results)


def _homes(jaxpr: Any, placed: dict) -> dict[Any, Any]:
    """In whose memory each variable lies: its own, or that of the tile that it is a view of."""
    home = {v: v for v in (*jaxpr.invars, *jaxpr.constvars)}
    for equation in jaxpr.eqns:
        tiles = [v for v in equation.invars if not trace.is_literal(v)]
        name = equation.primitive.name
        for v in equation.outvars:
            home[v] = v
        if name in cost.VIEWS and tiles:
            home[equation.outvars[0]] = home[tiles[0]]
            if name == "optimization_barrier":
                home |= {o: home[t] for o, t in zip(equation.outvars, tiles, strict=True)}
    return home


def _last_uses(jaxpr: Any, home: dict, owned: Collection[Any]) -> dict[Any, int]:
    """The place of the last equation that needs each tile; the end for what is not to be freed."""
    last: dict[Any, int] = {}
    sent: dict[Any, list[Any]] = {}  # what was received -> what was sent for it
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


def _note(equation, given, placed, specs, within) -> None:
    """Of an equation's results: whether they are placed, and how whole arrays lie."""
    name = equation.primitive.name
    fixed = within and all(given) and name not in trace.MOVES and name not in ("scan", "while")
    placed |= dict.fromkeys(equation.outvars, fixed)
    if not within and name == "shard_map":
        specs |= dict(
            zip(equation.outvars, relayout.kernel_specs(equation, "out_specs"), strict=True)
        )
        operands = zip(equation.invars, relayout.kernel_specs(equation, "in_specs"), strict=True)
        specs |= {v: s for v, s in operands if not trace.is_literal(v) and v not in specs}


def _bytes(v: Any, spec: Any, wafer: Wafer, within: bool) -> float:
    if not hasattr(v.aval, "shape"):
        return 0.0
    size = size_of(v) * width_of(v.aval)
    return float(size) if within else math.ceil(size / relayout.part_count(spec, wafer))
