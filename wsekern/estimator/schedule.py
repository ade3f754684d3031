"""This file is the walk over a program: when each operation begins and ends on a PE of the wafer.

All PEs run the same program, so one stands for them. It has a clock for its compute engine, whose
tasks begin when their data are there, and one for the links of each direction. A move begins when
what it sends is there and its links are free, whatever the engine does meanwhile; so communication
overlaps computation exactly where nothing waits for it. A scan is walked until its trips take
equally long, and the rest is multiplied. What nobody uses is not run.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from wsekern.estimator import cost, relayout, trace
from wsekern.estimator.cost import Constants
from wsekern.estimator.links import around_defects, price, roots
from wsekern.hardware import Machine
from wsekern.wafer.wafer import Wafer

_WALKED = 12  # trips of a scan, where they do not become steady before
_EVENTS = 20_000  # kept of a timeline
_GAPS = 32  # kept of the engine's time: later work is not moved before these


class Value(NamedTuple):
    """What is known of a variable."""

    ready: float = 0.0  # the cycle from which it is there
    placed: bool = False  # whether nothing but a PE's place and the trips of a loop decide it
    counted: bool = False  # whether the trip of a loop has a part in it
    spec: relayout.Spec | None = None  # of a whole array: how it lies, where that is known


PLACED = Value(placed=True)


class Event(NamedTuple):
    """What a lane ("compute", or the links of a direction) did, from one cycle to another.

    The lane "loop" is for the trips that were not walked.
    """

    lane: str
    start: float
    end: float
    name: str
    line: str


class Schedule:
    """The clocks of a walk, and what has been counted; the keys of `sums` say what."""

    def __init__(
        self,
        wafer: Wafer,
        constants: Constants,
        clock_hz: float,
        trips: int | None = None,
        density: float = 1.0,
    ):
        assert wafer.machine is not None
        self.machine: Machine = wafer.machine
        self.wafer, self.constants, self.clock_hz = wafer, constants, clock_hz
        self.trips = trips  # of loops whose length the trace does not say
        self.density = density  # the share of a product's factors that are not zero
        self.clocks: dict[str, float] = {"compute": 0.0}
        self.sums: dict[Any, float] = collections.defaultdict(float)
        self.unknown: dict[str, str] = {}  # operations without a cost, and where they stand
        self.events: list[Event] = []
        self._gaps: list[tuple[float, float]] = []  # in which the engine has nothing to do
        self._floor = 0.0  # before which no move begins: it would need a third buffer
        self._roots = 1  # that the floods of a loop have, one after another
        self._sizes = {axis: wafer.axis_size(axis) for axis in wafer.axes}
        self._starts: dict[int, dict[str, int]] = {}  # of floods, by their equations' ids
        self._memo: dict[Any, Any] = {}

    @property
    def cycles(self) -> float:
        """Until everything is done."""
        return max(self.clocks.values())

    def run(self, jaxpr: Any) -> None:
        """Walks the whole program."""
        outs = self._walk(jaxpr, [Value() for _ in jaxpr.invars], within=False)
        self.clocks["compute"] = max([self.clocks["compute"], *(v.ready for v in outs)])

    def _walk(self, jaxpr: Any, ins: Sequence[Value], within: bool) -> list[Value]:
        """The results of `jaxpr`, which is of tiles `within` a kernel and else of whole arrays."""
        here = dict.fromkeys(jaxpr.constvars, PLACED if within else Value())
        here |= dict(zip(jaxpr.invars, ins, strict=True))
        fusions = self._kept(cost.fusions, jaxpr)

        def value(atom: Any) -> Value:
            return PLACED if trace.is_literal(atom) else here[atom]

        if within:
            self._starts |= self._kept(roots.of_floods, jaxpr)
        live = self._kept(trace.live, jaxpr)
        for place, equation in enumerate(jaxpr.eqns):
            if place not in live:
                here |= dict.fromkeys(equation.outvars, Value())
                continue
            given = [value(v) for v in equation.invars]
            outs = self._do(equation, given, within, fusions, place)
            here.update(zip(equation.outvars, outs, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _do(self, equation, given, within, fusions, place) -> list[Value]:
        name = equation.primitive.name
        if within:
            rest = self._sizes, self.machine, self.wafer.placement
            move = self._kept(around_defects.of_equation, equation, *rest)
            if move is not None:
                return self._move(equation, move, given)
        if name == "scan":
            return self._scan(equation, given, within)
        if name == "while":
            return self._while(equation, given, within)
        if name == "cond":
            return self._cond(equation, given, within)
        if name == "shard_map":
            return self._kernel(equation, given)
        inner = trace.called(equation.params)
        if inner is not None:
            return self._walk(inner, trace.handed(equation, given), within)
        if not within:
            return self._whole(equation, given)
        return self._compute(equation, given, fusions, place)

    def _compute(self, equation, given, fusions, place) -> list[Value]:
        name, product = equation.primitive.name, fusions.sums.get(place)
        placed = all(v.placed for v in given)
        ready = max((v.ready for v in given), default=0.0)
        # A choice by a PE's place is made when the program is placed, and a tile product is summed
        # where its sum is.
        free = (
            placed
            or name in cost.VIEWS
            or (name == "select_n" and given[0].placed)
            or (name == "mul" and equation.outvars[0] in fusions.products)
            or product == "dot_general"
            or place in fusions.copies
        )
        if free:
            return [Value(ready, placed, any(v.counted for v in given))] * len(equation.outvars)
        self._note_unknown(equation)
        work = self._work(equation, product == "mul")
        return [Value(self._busy(equation, work, ready))] * len(equation.outvars)

    def _whole(self, equation, given) -> list[Value]:
        """An operation on whole arrays: evenly spread, but for what it has to move."""
        ready = max((v.ready for v in given), default=0.0)
        placed = bool(given) and all(v.placed for v in given)
        spec, moves = relayout.layout_of(equation, [v.spec for v in given], self.wafer)
        for move in moves:
            ready = self._sent(equation, move, ready)
        if placed or equation.primitive.name in cost.VIEWS:
            return [Value(ready, placed, spec=spec)] * len(equation.outvars)
        self._note_unknown(equation, spread={"dot_general"})
        work = self._work(equation)
        end = self._busy(equation, relayout.share(work, self.wafer, self.constants), ready)
        return [Value(end, spec=spec)] * len(equation.outvars)

    def _work(self, equation, accumulates: bool = False) -> cost.Work:
        work = cost.of_equation(equation, self.machine, self.constants, accumulates)
        return work.thinned(self.density) if equation.primitive.name == "dot_general" else work

    def _kernel(self, equation, given) -> list[Value]:
        """What `Wafer.map` runs; an operand that lies otherwise is laid out anew before."""
        ins = []
        for atom, value, spec in zip(
            equation.invars, given, relayout.specs(equation, "in_specs"), strict=True
        ):
            ready = value.ready
            if value.spec is not None and value.spec != spec:
                ready = self._sent(equation, relayout.relayout(atom.aval, self.wafer), ready)
            ins.append(Value(ready))
        outs = self._walk(trace.called(equation.params), ins, within=True)
        specs = relayout.specs(equation, "out_specs")
        return [Value(v.ready, spec=s) for v, s in zip(outs, specs, strict=True)]

    def _move(self, equation, move: price.Move, given) -> list[Value]:
        ready = max((v.ready for v in given), default=0.0)
        counted = any(v.counted for v in given) and move.kind == "flood"
        if id(equation) in self._starts and move.pattern is not None:
            move = move._replace(
                pattern=move.pattern.rooted(self._starts[id(equation)], self._sizes)
            )
        sent = self._sent(equation, move, ready, self._roots if counted else 1)
        return [Value(sent)] * len(equation.outvars)

    def _sent(self, equation, move: price.Move, ready: float, roots: int = 1) -> float:
        """When the move's words have arrived.

        A color is one route. Where floods have more `roots` one after another than there are
        colors, words are relayed from PE to PE of those that share one.
        """
        # The engine sets a move up between what else it does; the move itself waits for that alone.
        set_up = self.constants.vector_start + move.phases * self.constants.phase_start
        latency = move.latency
        if roots > self.machine.colors:
            latency += (-(-roots // self.machine.colors) - 1) * (
                self.constants.phase_start + 2 * self.machine.ramp_cycles + 1
            )
        self._set_up(equation, move.kind, set_up)
        free = [self.clocks.get(lane, 0.0) for lane in move.busy]
        start = max(ready + set_up, self._floor, *free)
        last = start
        for lane, words in move.busy.items():
            taken = words * self._cycles_of_word(lane)
            self.clocks[lane] = start + taken
            last = max(last, start + taken)
            self._note(lane, move.kind, equation, start, start + taken)
            self.sums["words", lane] += words
        if move.pattern is not None:
            self.sums["tiles", move.pattern] += move.tile
        self.sums["moves"] += 1
        self.sums["received"] += move.words
        self.sums["hops"] += move.hops
        self.sums["line", move.kind, self._line(equation)] += last + latency - start + set_up
        return last + latency

    def _busy(self, equation, work: cost.Work, ready: float) -> float:
        """When the engine has done the work, in the gaps first that it has waited through."""
        name, left, end = equation.primitive.name, work.cycles, ready
        gaps = []
        for begin, stop in self._gaps:
            start = max(begin, ready)
            taken = min(left, stop - start)
            if taken <= 0:
                gaps.append((begin, stop))
                continue
            left, end = left - taken, start + taken
            self._note("compute", name, equation, start, end)
            gaps += [(a, b) for a, b in ((begin, start), (end, stop)) if b > a]
        if left > 0:
            clock = self.clocks["compute"]
            start = max(clock, ready)
            if start > clock:
                gaps.append((clock, start))
            end = self.clocks["compute"] = start + left
            self._note("compute", name, equation, start, end)
        self._gaps = gaps[-_GAPS:]
        self.sums["flops", "float16" if work.narrow else "float32"] += work.flops
        self.sums["port bytes"] += work.port_bytes
        self.sums["line", name, self._line(equation)] += work.cycles
        return end

    def _scan(self, equation, given, within) -> list[Value]:
        body, length, consts, carry = self._kept(trace.loop_of, equation)
        held, carried, xs = given[:consts], given[consts : consts + carry], given[consts + carry :]
        if length == 0:
            return [*carried, *([Value()] * (len(body.outvars) - carry))]
        carried = self._placed_in_every_trip(body, held, carried, xs)
        floor, began = self._floor, self.clocks["compute"]
        before_roots, self._roots = self._roots, length
        xs = [v._replace(counted=v.placed) for v in xs]

        def once(carried):
            nonlocal began
            # What a trip receives has room from the trip before on.
            self._floor, began = max(floor, began), self.clocks["compute"]
            moves = self.sums["moves"]
            outs = self._walk(body, [*held, *carried, *xs], within)
            if self.sums["moves"] > moves:
                self._set_up(equation, "trip", self.constants.phase_start)
            return outs

        carried, outs = self._repeated(equation, once, carried, length)
        self._floor, self._roots = floor, before_roots
        last = max([v.ready for v in carried] + [v.ready for v in outs[carry:]], default=0.0)
        return [*carried, *(v._replace(ready=last, placed=False) for v in outs[carry:])]

    def _repeated(self, equation, once, carried, times) -> tuple[list[Value], list[Value]]:
        """What is carried after `once` as often as `times`, and all that the last one gave.

        Walked until one time is as the time before, which is then multiplied.
        """
        outs, before = carried, None
        for trip in range(times):
            sums, clocks = self.sums.copy(), dict(self.clocks)
            outs = once(carried)
            change = {lane: now - clocks.get(lane, 0.0) for lane, now in self.clocks.items()}
            new = outs[: len(carried)]
            later = [a.ready - b.ready for a, b in zip(new, carried, strict=True)]
            carried = new
            rest = times - trip - 1
            if _steady(before, (change, later)) or trip + 1 == _WALKED:
                left = self.cycles
                # The gaps of before, in which this trip may have found room, are soon full.
                work = self.sums["busy", "compute"] - sums.get(("busy", "compute"), 0.0)
                change["compute"] = max(change["compute"], work)
                for lane, by in change.items():
                    self.clocks[lane] += by * rest
                if rest:
                    name = f"{rest:,} trips more, each like the last"
                    line = self._line(equation)
                    self.events.append(Event("loop", left, self.cycles, name, line))
                carried = [
                    v._replace(ready=v.ready + by * rest)
                    for v, by in zip(carried, later, strict=True)
                ]
                self._gaps = []
                for key, value in list(self.sums.items()):
                    self.sums[key] += (value - sums.get(key, 0.0)) * rest
                break
            before = (change, later)
        return carried, outs

    def _placed_in_every_trip(self, body, held, carried, xs) -> list[Value]:
        """What is carried, as placed only where it stays so: a counter is, a tile is not."""
        while True:
            flags = [v.placed for v in (*held, *carried, *xs)]
            outs = trace.placed(body, flags)[: len(carried)]
            new = [
                v._replace(placed=v.placed and out) for v, out in zip(carried, outs, strict=True)
            ]
            if new == list(carried):
                return new
            carried = new

    def _while(self, equation, given, within) -> list[Value]:
        params = equation.params
        if self.trips is None:
            raise ValueError(
                f"estimate: a while loop at {trace.line_of(equation) or 'an unknown line'} runs as "
                "often as its data say; give trips=, how often to count it"
            )
        cond, body = (getattr(params[k], "jaxpr", params[k]) for k in ("cond_jaxpr", "body_jaxpr"))
        of_cond, of_body = params["cond_nconsts"], params["body_nconsts"]
        held, carried = given[of_cond : of_cond + of_body], given[of_cond + of_body :]

        def once(carried):
            self._walk(cond, [*given[:of_cond], *carried], within)
            outs = self._walk(body, [*held, *carried], within)
            return [v._replace(placed=False) for v in outs]

        return self._repeated(equation, once, carried, self.trips)[0]

    def _cond(self, equation, given, within) -> list[Value]:
        """The branch that takes longest."""
        at, known = given[0], given[1:]
        waiting = [v._replace(ready=max(v.ready, at.ready)) for v in known]
        worst: tuple | None = None
        start = dict(self.clocks), self.sums.copy(), list(self.events)
        for branch in equation.params["branches"]:
            self.clocks, self.sums, self.events = dict(start[0]), start[1].copy(), start[2].copy()
            outs = self._walk(getattr(branch, "jaxpr", branch), waiting, within)
            if worst is None or self.cycles > max(worst[0].values()):
                worst = self.clocks, self.sums, self.events, outs
        assert worst is not None
        self.clocks, self.sums, self.events, outs = worst
        return [v._replace(placed=False) for v in outs]

    def _cycles_of_word(self, lane: str) -> float:
        if lane != "wafer":
            return 4 / self.machine.link_bytes_per_cycle
        pes = self.wafer.height * self.wafer.width  # which share the wafer's channels
        return pes * 4 * self.clock_hz / self.machine.io_bytes_per_second

    def _note_unknown(self, equation, spread: frozenset | set = frozenset()) -> None:
        name = equation.primitive.name
        if name not in cost.KNOWN or name in spread:
            self.unknown.setdefault(name, trace.line_of(equation))

    def _set_up(self, equation, what: str, cycles: float) -> None:
        """The engine's part in what PEs do together, after all that it was given before."""
        start = self.clocks["compute"]
        self.clocks["compute"] += cycles
        self.sums["busy", "compute"] += cycles
        self._record("compute", f"set up {what}", equation, start, start + cycles)

    def _note(self, lane, name, equation, start, end) -> None:
        self.sums["busy", lane] += end - start
        self._record(lane, name, equation, start, end)

    def _record(self, lane, name, equation, start, end) -> None:
        if len(self.events) < _EVENTS and end > start:
            self.events.append(Event(lane, start, end, name, self._line(equation)))

    def _line(self, equation) -> str:
        return self._kept(trace.line_of, equation)

    def _kept(self, function: Callable, of: Any, *rest: Any) -> Any:
        """`function(of, *rest)`, computed once."""
        key = function, id(of)  # alive as long as the trace is
        if key not in self._memo:
            self._memo[key] = function(of, *rest)
        return self._memo[key]


def _steady(before: tuple | None, now: tuple) -> bool:
    if before is None or before[0].keys() != now[0].keys():
        return False
    pairs = [(before[0][k], now[0][k]) for k in now[0]]
    pairs += list(zip(before[1], now[1], strict=True))
    return all(abs(a - b) <= 1e-6 * max(1.0, abs(a)) for a, b in pairs)
