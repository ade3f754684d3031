"""When each operation of a program starts and ends on a PE: a walk over the program's trace.

One PE stands for all, since all run the same program; `clocks` has its engine and links. The walk
follows the equations in order and asks the clocks when each is done. Equations whose results nobody
uses do not run. A loop is walked until its trips take equally long; the others are multiplied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn

from wsekern.estimator import contractions, cost, layouts, loops, relayout, trace
from wsekern.estimator.clocks import Clocks
from wsekern.estimator.cost import Constants
from wsekern.estimator.layout_rules import steps_on_a_tile
from wsekern.estimator.links import around_defects, roots
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.reshapes import spec_after_reshape
from wsekern.estimator.specs import assumed_spec
from wsekern.estimator.variable_state import STATIC, VariableState
from wsekern.hardware import Machine
from wsekern.wafer.wafer import Wafer

_PRODUCTS = "/kernels/matmul/"  # the folder of the library's products


class Schedule:
    """One walk over a program, with its clocks."""

    def __init__(
        self,
        wafer: Wafer,
        constants: Constants,
        clock_hz: float,
        trips: int | None = None,
        density: float = 1.0,
        vectors_along_rows: bool = False,
    ) -> None:
        assert wafer.machine is not None
        self.machine: Machine = wafer.machine
        self.wafer, self.constants, self.clock_hz = wafer, constants, clock_hz
        self.trips = trips  # of loops whose length the trace does not say
        self.density = density  # the share of a product's factors that are not zero
        self.vectors_along_rows = vectors_along_rows  # of tile products; see `cost.equation_work`
        self.clocks = Clocks(wafer, constants, clock_hz)
        self.unknown: dict[str, str] = {}  # operations without a cost, and their source lines
        self.assumed: dict[str, str] = {}  # programs that contractions stand for, likewise
        self.stand_ins: dict[int, contractions.StandIn] = {}  # of contractions, by equations' ids
        # The source line of the call whose jaxpr is being walked, and whether the library made it;
        # of the whole program, its caller's.
        self._call, self._by_library = trace.line_of_caller(), False
        self._last_collective: int | None = None  # the id of what PEs began together last
        self._in_product = False  # whether the call is of the library's matrix products
        self._flops_are_known = False  # of the kernel that is being walked, whatever its tiles are
        self._flood_roots = 1  # PEs from which the floods of the loop around start, in turn
        self._sizes = {axis: wafer.axis_size(axis) for axis in wafer.axes}
        self._fixed_roots: dict[int, dict[str, int]] = {}  # of floods, by their equations' ids
        # The states of arrays that the equation being walked had to lay out anew first.
        self._laid_out: dict[Any, VariableState] = {}
        self._memo: dict[Any, Any] = {}

    @property
    def cycles(self) -> float:
        """The cycle at which everything is done."""
        return self.clocks.cycles

    def run(self, jaxpr: Jaxpr) -> None:
        """Walks the whole program."""
        outs = self._walk(jaxpr, [VariableState() for _ in jaxpr.invars], in_kernel=False)
        ends = [
            self._write_result(atom, state) for atom, state in zip(jaxpr.outvars, outs, strict=True)
        ]
        self.clocks.finish(max(ends, default=0.0))

    def _write_result(self, atom: Any, state: VariableState) -> float:
        """The cycle at which a result of the program lies where results lie, written out.

        What only describes an array in another way is free within a program. A program that
        returns it writes it: `x.T` and `jnp.repeat(x, 2)` are arrays of their own.
        """
        shape = getattr(atom.aval, "shape", ())
        if trace.is_literal(atom) or state.static or not shape:
            return state.ready
        state = self._lay_out(atom, state)
        ready = state.ready
        moves: list[PricedMove] = []
        program = "transpose"
        if state.assumed:
            wanted = assumed_spec(shape, self.wafer)
            moves = layouts.lay_out_as(atom.aval, state.spec, True, wanted, self.wafer)
        elif state.from_scan and state.spec is not None:
            program, wanted = "scan", assumed_spec(shape, self.wafer)
            moves = relayout.tile_move(atom.aval, state.spec, wanted, self.wafer)
        for move in moves:
            self.assumed.setdefault(f"{program} as a relayout", state.line)
            ready = self._send(state.line, move, ready)
        if state.is_view and not moves:
            work = cost.copy_work(atom.aval, self.machine, self.constants)
            work = relayout.spread_work(work, shape, state.spec, state.assumed, self.wafer)
            ready = self.clocks.compute("copy", state.line, work, ready)
        return ready

    def _walk(
        self, jaxpr: Jaxpr, operands: Sequence[VariableState], in_kernel: bool
    ) -> list[VariableState]:
        """The results of `jaxpr`, which is about a PE's tiles in a kernel, else about arrays."""
        states = dict.fromkeys(jaxpr.constvars, STATIC if in_kernel else VariableState())
        states |= dict(zip(jaxpr.invars, operands, strict=True))
        fusions = self._memoize(cost.find_fusions, jaxpr)

        def state_of(atom: Any) -> VariableState:
            return STATIC if trace.is_literal(atom) else states[atom]

        if in_kernel:
            self._fixed_roots |= self._memoize(roots.find_flood_roots, jaxpr)
        used = self._memoize(trace.used_equations, jaxpr)
        for place, equation in enumerate(jaxpr.eqns):
            if place not in used:
                states |= dict.fromkeys(equation.outvars, VariableState())
                continue
            ins = [state_of(v) for v in equation.invars]
            outs = self._run_equation(equation, ins, in_kernel, fusions, place)
            states |= {v: state for v, state in self._laid_out.items() if v in states}
            self._laid_out.clear()
            states.update(zip(equation.outvars, outs, strict=True))
        return [state_of(v) for v in jaxpr.outvars]

    def _run_equation(
        self,
        equation: JaxprEqn,
        operands: list[VariableState],
        in_kernel: bool,
        fusions: cost.Fusions,
        place: int,
    ) -> list[VariableState]:
        name = equation.primitive.name
        # Moves come first: a flood and a reduction are calls, and are priced as a whole.
        if in_kernel:
            grid = self._sizes, self.machine, self.wafer.placement
            move = self._memoize(around_defects.price_move, equation, *grid)
            if move is not None:
                return self._move(equation, move, operands)
        walks = {"scan": self._scan, "while": self._while, "cond": self._cond}
        inner = trace.inner_jaxpr(equation.params)
        if name in walks or inner is not None:
            with self._called_by(equation):
                if name in walks:
                    return walks[name](equation, operands, in_kernel)
                if name == "shard_map":
                    return self._kernel(equation, operands)
                return self._walk(inner, trace.inner_operands(equation, operands), in_kernel)
        if not in_kernel:
            return self._on_arrays(equation, operands)
        return self._on_tiles(equation, operands, fusions, place)

    def _on_tiles(
        self, equation: JaxprEqn, operands: list[VariableState], fusions: cost.Fusions, place: int
    ) -> list[VariableState]:
        name, product = equation.primitive.name, fusions.sums.get(place)
        static = all(v.static for v in operands)
        ready = max((v.ready for v in operands), default=0.0)
        free = (
            static
            or name in cost.VIEWS
            # jnp.where(axis_index("x") == 0, a, b): each PE's program contains its own choice.
            or (name == "select_n" and operands[0].static)
            # a * b + c is one instruction, charged at the sum.
            or (name == "mul" and equation.outvars[0] in fusions.products)
            # c + a @ b: the tile product accumulates into c as it goes.
            or product == "dot_general"
            or place in fusions.copies
            # A move along an axis of one PE is none.
            or name in trace.MOVES
        )
        if free:
            from_counter = any(v.from_counter for v in operands)
            return [VariableState(ready, static, from_counter)] * len(equation.outvars)
        self._note_unknown(equation)
        if program := steps_on_a_tile(name):
            self.assumed.setdefault(f"{name} as {program}", self._line(equation))
        work = self._work(equation, accumulates=product == "mul")
        return [VariableState(self._compute(equation, work, ready))] * len(equation.outvars)

    def _on_arrays(self, equation: JaxprEqn, operands: list[VariableState]) -> list[VariableState]:
        """An operation on whole arrays: spread as they lie, after the moves that this asks for."""
        ready = max((v.ready for v in operands), default=0.0)
        name, line = equation.primitive.name, self._line(equation)
        fixed = all(v.static for v in operands) and not equation.effects
        # Random numbers are drawn when the program runs, also those of a fixed key.
        if fixed and name not in cost.RANDOM:
            return [VariableState(ready, static=True)] * len(equation.outvars)
        if name in cost.PRODUCTS and self.wafer.size > 1:
            return self._contraction(equation, operands)
        if name == "reshape":
            return [self._reshape(equation, operands[0])]
        if name == "optimization_barrier":  # every result is an operand, and waits for all of them
            return [v._replace(ready=ready) for v in operands]
        before = layouts.order_kept(equation, operands, self.wafer)
        if before is None:
            anywhere = layouts.read_anywhere(equation)
            operands = [
                v._replace(spec=None, before=None) if i in anywhere else self._lay_out(atom, v)
                for i, (atom, v) in enumerate(zip(equation.invars, operands, strict=True))
            ]
            ready = max((v.ready for v in operands), default=0.0)
        specs, assumed = [v.spec for v in operands], [v.assumed for v in operands]
        static = [v.static for v in operands]
        layout = layouts.result_layout(equation, specs, assumed, self.wafer, static)
        for move in layout.moves:
            ready = self._send_for(equation, move, ready)
        if layout.program:
            self.assumed.setdefault(f"{name} as {layout.program}", line)
        is_view = name in cost.VIEWS
        if not is_view:
            self._note_unknown(equation)
            shape, spec = layouts.largest_array(equation, specs, layout.spec, self.wafer)
            work = self._work(equation)
            work = relayout.spread_work(work, shape, spec, layout.assumed, self.wafer)
            ready = self._compute(equation, work, ready)
        state = VariableState(ready, spec=layout.spec, assumed=layout.assumed, line=line)
        from_scan = not layout.assumed and any(v.from_scan for v in operands)
        state = state._replace(is_view=is_view, from_scan=from_scan)
        if operands:
            true_shape = layouts.shape_before_padding(equation, operands[0].true_shape)
            state = state._replace(true_shape=true_shape)
        if before is not None and cost.size_of(equation.outvars[0]) > 1:
            state = state._replace(spec=None, before=before, assumed=any(assumed))
        shapes = [getattr(v.aval, "shape", ()) for v in equation.outvars]
        return [
            state if len(shape) == len(shapes[0]) else state._replace(spec=None, before=None)
            for shape in shapes
        ]

    def _reshape(self, equation: JaxprEqn, operand: VariableState) -> VariableState:
        """The state of a reshaped array. Nothing moves before an operation needs its new order."""
        source: Any = equation.invars[0].aval
        shape, spec = operand.before or (source.shape, operand.spec)
        assumed = operand.assumed or spec is None
        spec = assumed_spec(shape, self.wafer) if spec is None else spec
        out: Any = equation.outvars[0].aval
        new = spec_after_reshape(shape, out.shape, spec, self.wafer)
        before = (shape, spec) if new is None else None
        state = VariableState(operand.ready, spec=new, assumed=assumed, before=before)
        state = state._replace(from_scan=operand.from_scan)
        return state._replace(line=self._line(equation), is_view=True)

    def _lay_out(self, atom: Any, state: VariableState) -> VariableState:
        """The state after a reshaped array was laid out in its new order; of others, as it is."""
        if state.before is None:
            return state
        if state.assumed:
            self.assumed.setdefault("reshape as a relayout", state.line)
        move = relayout.relayout_move(atom.aval, self.wafer)
        ready = self._send(state.line, move, state.ready)
        spec = assumed_spec(atom.aval.shape, self.wafer)
        state = state._replace(ready=ready, spec=spec, before=None, is_view=False)
        self._laid_out[atom] = state  # for whatever else reads it
        return state

    def _contraction(
        self, equation: JaxprEqn, operands: list[VariableState]
    ) -> list[VariableState]:
        """A product of whole arrays, walked as the program that it is assumed to run as."""
        sizes = contractions.sizes_of(equation)
        if sizes.M * sizes.N > 1:  # two vectors may lie in any order
            operands = [
                v if v.assumed else self._lay_out(atom, v)
                for atom, v in zip(equation.invars, operands, strict=True)
            ]
        ready = max(v.ready for v in operands)
        if not sizes.flops:
            return [VariableState(ready)]
        if sizes not in self._memo:
            self._memo[sizes] = self._cheapest(sizes)
        stand_in = self._memo[sizes]
        self.stand_ins[id(equation)] = stand_in
        self.assumed.setdefault(
            f"{equation.primitive.name} as {stand_in.name}", self._line(equation)
        )
        for move in layouts.rim_moves(equation, [v.spec for v in operands], self.wafer):
            ready = self._send_for(equation, move, ready)
        ins = [VariableState(ready)] * len(stand_in.jaxpr.invars)
        if stand_in.as_given:
            # A layout that was assumed is no reason to lay a factor out anew.
            ins = [v._replace(ready=ready, spec=None if v.assumed else v.spec) for v in operands]
        whole, flops = (self.wafer, self._sizes), self.clocks.totals.flops.copy()
        self.wafer, self._sizes = stand_in.region, relayout.sizes_of(stand_in.region)
        with self._called_by(equation):
            self._by_library = True  # the stand-in is the library's own
            outs = self._walk(stand_in.jaxpr, ins, in_kernel=False)
        self.wafer, self._sizes = whole
        # Padding and PEs without a part are no operations of the program.
        kind = "float16" if sizes.bytes == 2 else "float32"
        flops[kind] += self.density * sizes.flops / self.wafer.size
        self.clocks.totals.flops = flops
        out: Any = equation.outvars[0].aval
        spec = outs[0].spec if stand_in.as_given and len(out.shape) == 2 else None
        return [VariableState(outs[0].ready, spec=spec)]

    def _cheapest(self, sizes: contractions.Sizes) -> contractions.StandIn:
        def price(jaxpr: Jaxpr, region: Wafer) -> float:
            walk = Schedule(region, self.constants, self.clock_hz, density=self.density)
            walk.run(jaxpr)
            return walk.cycles

        return contractions.cheapest(sizes, self.wafer, price)

    def _work(self, equation: JaxprEqn, accumulates: bool = False) -> cost.Work:
        work = cost.equation_work(
            equation, self.machine, self.constants, accumulates, self.vectors_along_rows
        )
        name = equation.primitive.name
        if self._flops_are_known and name in ("dot_general", "add", "add_any"):
            work = work._replace(flops=0.0)
        # Only a tile product skips factors that are zero.
        return work.scale(self.density) if name == "dot_general" else work

    def _kernel(self, equation: JaxprEqn, operands: list[VariableState]) -> list[VariableState]:
        """A kernel under `Wafer.map`, after a relayout of each operand that lies otherwise."""
        ins = []
        for atom, operand, spec in zip(
            equation.invars, operands, layouts.kernel_specs(equation, "in_specs"), strict=True
        ):
            # Where only assumptions say how an array lay, it may lie as the kernel needs it.
            if not operand.assumed:
                operand = self._lay_out(atom, operand)
            ready = operand.ready
            for move in layouts.lay_out_as(
                atom.aval, operand.spec, operand.assumed, spec, self.wafer
            ):
                ready = self._send_for(equation, move, ready)
            ins.append(VariableState(ready))
        asked = None
        if self._in_product:
            asked = contractions.asked_flops(equation, [v.true_shape for v in operands])
        self._flops_are_known = asked is not None
        outs = self._walk(trace.inner_jaxpr(equation.params), ins, in_kernel=True)
        self._flops_are_known = False
        if asked is not None:
            # The cycles of padding count; as work, only what was asked for does.
            kind = "float16" if cost.width_of(equation.invars[0].aval) == 2 else "float32"
            self.clocks.totals.flops[kind] += self.density * asked / self.wafer.size
        specs = layouts.kernel_specs(equation, "out_specs")
        return [VariableState(v.ready, spec=s) for v, s in zip(outs, specs, strict=True)]

    def _move(
        self, equation: JaxprEqn, move: PricedMove, operands: list[VariableState]
    ) -> list[VariableState]:
        ready = max((v.ready for v in operands), default=0.0)
        # In SUMMA, trip k floods from PE k: the loop's counter decides who sends.
        root_turns = move.kind == "flood" and any(v.from_counter for v in operands)
        if id(equation) in self._fixed_roots and move.pattern is not None:
            places = self._fixed_roots[id(equation)]
            move = move._replace(pattern=move.pattern.with_root(places, self._sizes))
        roots_of_floods = self._flood_roots if root_turns else 1
        arrived = self._send_for(equation, move, ready, roots_of_floods)
        return [VariableState(arrived)] * len(equation.outvars)

    def _scan(
        self, equation: JaxprEqn, operands: list[VariableState], in_kernel: bool
    ) -> list[VariableState]:
        body, length, consts, carry = self._memoize(trace.scan_parts, equation)
        constants, carried = operands[:consts], operands[consts : consts + carry]
        scanned = operands[consts + carry :]
        if length == 0:
            return [*carried, *([VariableState()] * (len(body.outvars) - carry))]
        carried = loops.static_in_every_trip(body, constants, carried, scanned)
        laid_out: dict[Any, VariableState] = {}
        if not in_kernel:
            pairs = list(zip(equation.invars[consts + carry :], scanned, strict=True))
            scanned = [self._lay_out_rows(atom, v, equation) for atom, v in pairs]
            laid_out = {
                atom: new for (atom, v), new in zip(pairs, scanned, strict=True) if new != v
            }
        clocks, roots_before = self.clocks, self._flood_roots
        earliest, began = clocks.earliest_move, clocks.busy_until["compute"]
        self._flood_roots = length
        # A trip sees one entry of what is scanned.
        scanned = [
            v._replace(
                from_counter=v.static,
                from_scan=False,
                spec=None if v.assumed or not v.spec else v.spec[1:],
                true_shape=v.true_shape and v.true_shape[1:],
            )
            for v in scanned
        ]

        def run_trip(carried: Sequence[VariableState]) -> list[VariableState]:
            nonlocal began
            # Communication runs ahead by one trip at most, as two buffers allow. In SUMMA:
            #   the engine computes on panel 4 (buffer A) while panel 5 arrives (buffer B);
            #   panel 6 needs a third buffer, or A, which is free when panel 5's product begins.
            # So no move of a trip starts before the engine began the trip before it.
            clocks.earliest_move = max(earliest, began)
            began, moves = clocks.busy_until["compute"], clocks.totals.moves
            outs = self._walk(body, [*constants, *carried, *scanned], in_kernel)
            if not in_kernel:  # a row that was reshaped is written in its new order
                rows = zip(body.outvars[carry:], outs[carry:], strict=True)
                outs[carry:] = [self._lay_out(atom, v) for atom, v in rows]
                self._laid_out.clear()
            # PEs meet once in a trip that moves anything; a trip that moves nothing is free.
            if clocks.totals.moves > moves:
                clocks.set_up("trip of a loop", self._line(equation), self.constants.phase_start)
            return outs

        carried, outs = loops.repeat(clocks, self._line(equation), run_trip, carried, length)
        clocks.earliest_move, self._flood_roots = earliest, roots_before
        # Stacked results are whole only after the last trip.
        last = max([v.ready for v in carried] + [v.ready for v in outs[carry:]], default=0.0)
        stacked = [VariableState(last, line=self._line(equation)) for _ in outs[carry:]]
        if not in_kernel and self.wafer.size > 1:
            rows = zip(stacked, body.outvars[carry:], outs[carry:], strict=True)
            stacked = [
                loops.stack(state, atom.aval, row, length, self.wafer) for state, atom, row in rows
            ]
        self._laid_out |= laid_out  # a later scan, as that of a gradient, finds them so
        return [*carried, *stacked]

    def _lay_out_rows(self, atom: Any, state: VariableState, equation: JaxprEqn) -> VariableState:
        """The state of a scanned array once every PE has its part of every row."""
        if state.static:
            return state
        spec, moves = loops.lay_out_rows(atom.aval, state, self.wafer)
        guessed = state.assumed or (state.spec is None and state.before is None)
        if moves and guessed:
            self.assumed.setdefault("scan as a relayout", self._line(equation))
        for move in moves:
            state = state._replace(ready=self._send_for(equation, move, state.ready))
        if not moves:
            return state
        return state._replace(spec=spec, assumed=guessed, before=None, is_view=False)

    def _while(
        self, equation: JaxprEqn, operands: list[VariableState], in_kernel: bool
    ) -> list[VariableState]:
        params = equation.params
        if self.trips is None:
            raise ValueError(
                f"estimate: a while loop at {self._line(equation) or 'an unknown line'} runs as "
                "often as its data say; give trips=, how often to count it"
            )
        cond, body = (getattr(params[k], "jaxpr", params[k]) for k in ("cond_jaxpr", "body_jaxpr"))
        # Operands are the condition's constants, the body's constants, and what is carried.
        start = params["cond_nconsts"]
        end = start + params["body_nconsts"]
        of_cond, of_body, carried = operands[:start], operands[start:end], operands[end:]

        def run_trip(carried: Sequence[VariableState]) -> list[VariableState]:
            # No trip starts before it is known whether there is one.
            known = self._walk(cond, [*of_cond, *carried], in_kernel)[0].ready
            carried = [v._replace(ready=max(v.ready, known)) for v in carried]
            outs = self._walk(body, [*of_body, *carried], in_kernel)
            # Data decide when the loop ends, so that nothing it carries is known before it runs.
            return [v._replace(static=False) for v in outs]

        return loops.repeat(self.clocks, self._line(equation), run_trip, carried, self.trips)[0]

    def _cond(
        self, equation: JaxprEqn, operands: list[VariableState], in_kernel: bool
    ) -> list[VariableState]:
        """The branch that takes longest; each is walked from the same clocks."""
        choice, *values = operands
        # No branch starts before it is known which.
        values = [v._replace(ready=max(v.ready, choice.ready)) for v in values]
        start, assumed, ends = self.clocks.snapshot(), self.assumed, []
        for branch in equation.params["branches"]:
            self.clocks.restore(start)
            self.assumed = dict(assumed)
            outs = self._walk(getattr(branch, "jaxpr", branch), values, in_kernel)
            ends.append((self.cycles, self.clocks.snapshot(), outs, self.assumed))
        _, longest, outs, self.assumed = max(ends, key=lambda end: end[0])
        self.clocks.restore(longest)
        return [v._replace(static=False) for v in outs]

    def _compute(self, equation: JaxprEqn, work: cost.Work, ready: float) -> float:
        return self.clocks.compute(equation.primitive.name, self._line(equation), work, ready)

    def _send_for(
        self, equation: JaxprEqn, move: PricedMove, ready: float, roots: int = 1
    ) -> float:
        """The cycle at which a move that an equation asks for has arrived."""
        if move.phases:
            # PEs that repeat a reduction still know its routes, their places in its trees and its
            # vectors. Equal reductions share their jaxpr; a flood may start from another PE.
            collective = id(equation.params.get("jaxpr", equation))
            if collective == self._last_collective and move.kind != "flood":
                move = move._replace(phases=0)
            self._last_collective = collective
        return self._send(self._line(equation), move, ready, roots)

    def _send(self, line: str, move: PricedMove, ready: float, roots: int = 1) -> float:
        if self.wafer.size < self.clocks.pes:
            # A map of the links is of the whole wafer, and this move is within a region.
            move = move._replace(pattern=None)
        return self.clocks.send(move, line, ready, roots)

    def _note_unknown(self, equation: JaxprEqn) -> None:
        name = equation.primitive.name
        if name not in cost.KNOWN:
            self.unknown.setdefault(cost.user_term(name), self._line(equation))

    def _line(self, equation: JaxprEqn) -> str:
        return self._memoize(trace.line_of, equation).within(self._call, self._by_library)

    @contextlib.contextmanager
    def _called_by(self, equation: JaxprEqn) -> Iterator[None]:
        """While this is open, what is walked is inside of the call `equation`."""
        outer = self._call, self._by_library, self._in_product
        self._in_product |= self._memoize(trace.asked_by, equation, _PRODUCTS)
        direct = self._memoize(trace.line_of, equation).direct
        self._call, self._by_library = self._line(equation), not direct
        yield
        self._call, self._by_library, self._in_product = outer

    def _memoize(self, function: Callable, of: Any, *arguments: Any) -> Any:
        """`function(of, *arguments)`, computed once for each `of`; `arguments` never change."""
        # A loop's body is walked several times. Its id is safe as a key: the trace outlives it.
        key = function, id(of)
        if key not in self._memo:
            self._memo[key] = function(of, *arguments)
        return self._memo[key]
