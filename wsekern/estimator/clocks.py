"""One PE's compute engine and links: until when each is busy, and what it did.

All PEs run the same program, so one stands for them. It has a clock for its engine and one for its
links in each direction. Work starts when its operands are there and its engine or links are free;
communication overlaps computation exactly where neither waits for the other.
"""

from __future__ import annotations

from typing import NamedTuple

from wsekern.estimator.cost import Constants, Work
from wsekern.estimator.links.price import PricedMove
from wsekern.estimator.totals import Totals
from wsekern.hardware import Machine
from wsekern.wafer.wafer import Wafer

_EVENTS = 20_000  # kept for the timeline; a longer one is of no use to a reader
_IDLE_SPANS = 32  # remembered of the engine; work does not move up past older ones


class Event(NamedTuple):
    """What one lane did, from one cycle to another.

    A lane is "compute", the links of one direction ("N", "E", "S", "W", "wafer"), or "loop" for
    trips of a loop that were not walked. What lanes do in such trips is one event a lane, and so is
    what comes after the first 20,000 events.
    """

    lane: str
    start: float
    end: float
    name: str
    line: str
    share: float = 1.0  # of the time from start to end in which the lane is busy


class ClocksState(NamedTuple):
    """What `Clocks.restore` goes back to."""

    busy_until: dict[str, float]
    totals: Totals
    events: list[Event]
    later: dict[str, float]
    idle: list[tuple[float, float]]
    counted: float


class Clocks:
    """The clocks of one PE, in cycles, and the totals of all that ran on it."""

    def __init__(self, wafer: Wafer, constants: Constants, clock_hz: float) -> None:
        assert wafer.machine is not None
        self.machine: Machine = wafer.machine
        self.constants = constants
        self.busy_until: dict[str, float] = {"compute": 0.0}  # by lane
        self.totals = Totals()
        self.events: list[Event] = []
        self._later: dict[str, float] = {}  # cycles by lane, of what has no event of its own
        # No move starts before this cycle, because its buffer is still in use; see Schedule._scan.
        self.earliest_move = 0.0
        self._idle: list[tuple[float, float]] = []  # spans in which the engine had nothing to do
        self._counted = 0.0  # all cycles before this one are in `totals.cycles`
        self._cycles_per_word = dict.fromkeys("NESW", 4 / self.machine.link_bytes_per_cycle)
        # All PEs of a wafer share its channels to the other wafers.
        pes = wafer.height * wafer.width
        self.pes = wafer.size  # of all wafers
        self._cycles_per_word["wafer"] = pes * 4 * clock_hz / self.machine.io_bytes_per_second

    @property
    def cycles(self) -> float:
        """The cycle at which the engine and all links are done."""
        return max(self.busy_until.values())

    def compute(self, name: str, line: str, work: Work, ready: float) -> float:
        """The cycle at which the engine has done `work`.

        The walk meets work in program order, but a PE runs a task once its data are there. So work
        first fills the spans in which the engine waited, which are in the past of its clock:

          engine so far     AAAA......BB     idle from 4 to 10, its clock at 12
          6 cycles of C, whose operands are ready at cycle 7
          engine afterwards AAAA...CCCBBCCC

        Args:
          name: of the operation, for the timeline.
          line: of the source.
          work: what it is.
          ready: the cycle from which its operands are there.
        """
        left, end = work.cycles, ready
        idle = []
        for begin, stop in self._idle:
            start = max(begin, ready)
            taken = min(left, stop - start)
            if taken <= 0:
                idle.append((begin, stop))
                continue
            left, end = left - taken, start + taken
            self._occupy("compute", name, line, start, end)
            idle += [(a, b) for a, b in ((begin, start), (end, stop)) if b > a]
        if left > 0:
            clock = self.busy_until["compute"]
            start = max(clock, ready)
            if start > clock:
                idle.append((clock, start))
            end = self.busy_until["compute"] = start + left
            self._occupy("compute", name, line, start, end)
        self._idle = idle[-_IDLE_SPANS:]
        self.totals.flops["float16" if work.narrow else "float32"] += work.flops
        self.totals.port_bytes += work.port_bytes
        self._count(name, line, end)
        return end

    def send(self, move: PricedMove, line: str, ready: float, roots: int = 1) -> float:
        """The cycle at which the words of `move` have arrived.

        Args:
          move: what is sent, priced.
          line: of the source.
          ready: the cycle from which its operands are there.
          roots: of floods in a loop, how many PEs start one, in turn.
        """
        set_up = self.constants.vector_start + move.phases * self.constants.phase_start
        latency = move.latency
        if roots > self.machine.colors:
            # A color is one route, so that each root needs its own. Roots that share a color relay
            # words from one to the next: with 24 colors, 60 roots make 2 relays.
            latency += (-(-roots // self.machine.colors) - 1) * (
                self.constants.phase_start + 2 * self.machine.ramp_cycles + 1
            )
        self.set_up(move.kind, line, set_up)
        # The engine sets a move up between its other tasks. The move waits for that set-up, which
        # begins once its data are there, but not for whatever else the engine has to do.
        free = [self.busy_until.get(lane, 0.0) for lane in move.busy]
        start = max(ready + set_up, self.earliest_move, *free)
        last = start
        for lane, words in move.busy.items():
            end = start + words * self._cycles_per_word[lane]
            self.busy_until[lane] = end
            last = max(last, end)
            self._occupy(lane, move.kind, line, start, end)
            self.totals.words[lane] += words
        if move.pattern is not None:
            self.totals.tiles[move.pattern] += move.tile
        self.totals.moves += 1
        self.totals.received += move.words
        self.totals.hops += move.hops
        self._count(move.kind, line, last + latency)
        return last + latency

    def set_up(self, name: str, line: str, cycles: float) -> None:
        """Charges the engine for its part in what PEs do together, after all its work so far.

        Set-up does not fill idle spans: a move or a trip begins in the order of the program.
        """
        start = self.busy_until["compute"]
        self.busy_until["compute"] += cycles
        self.totals.busy["compute"] += cycles
        self._record("compute", f"set up {name}", line, start, start + cycles)
        self._count(name, line, start + cycles)

    def repeat(self, times: int, advance: dict[str, float], since: Totals, line: str) -> None:
        """Runs the clocks and the totals on by more trips of a loop, each like the last one walked.

        Args:
          times: how many trips.
          advance: by how much the last trip moved the clock of each lane.
          since: the totals before that trip.
          line: of the loop.
        """
        walked = self.cycles
        # The last trip may have put work into idle spans of earlier ones, so that its clock moved
        # less than it worked. Those spans are soon full; no trip can be shorter than its work.
        work = self.totals.busy["compute"] - since.busy["compute"]
        advance = advance | {"compute": max(advance["compute"], work)}
        name = f"{times:,} trips more, each like the last"
        for lane, cycles in advance.items():
            begin = self.busy_until[lane]
            end = self.busy_until[lane] = begin + cycles * times
            busy = times * (self.totals.busy.get(lane, 0.0) - since.busy.get(lane, 0.0))
            if busy > 0 and end > begin:
                self._record(lane, name, line, begin, end, min(1.0, busy / (end - begin)))
        if times and len(self.events) < _EVENTS:
            self.events.append(Event("loop", walked, self.cycles, name, line))
        self._idle = []
        before = dict(self.totals.cycles)
        self.totals.repeat(since, times)
        # Rows of later trips share out the cycles that the clocks moved on, as in the last trip.
        new = {key: n - before[key] for key, n in self.totals.cycles.items()}
        longer, shared = self.cycles - walked, sum(new.values())
        for key, n in new.items():
            self.totals.cycles[key] = before[key] + (n * longer / shared if shared else 0.0)
        if longer and not shared:
            self.totals.cycles["trip of a loop", line] += longer
        self._counted += longer

    def finish(self, end: float) -> None:
        """Ends the program, whose results are there at `end`, and makes its rows add up to that.

        A result may still be on its last hops when the engine and all links are free.
        """
        self.busy_until["compute"] = max(self.busy_until["compute"], end)
        # What came after the last result, as a move that nobody waits for, takes no time.
        share = self.cycles / self._counted if self._counted else 0.0
        for key in self.totals.cycles:
            self.totals.cycles[key] *= share
        self._counted = self.cycles

    def snapshot(self) -> ClocksState:
        """The state now, for `restore`."""
        return ClocksState(
            dict(self.busy_until),
            self.totals.copy(),
            list(self.events),
            dict(self._later),
            list(self._idle),
            self._counted,
        )

    def timeline(self) -> list[Event]:
        """All events; those that were too many as one for each lane, after the others of it."""
        kept: dict[str, float] = {}
        for event in self.events:
            kept[event.lane] = max(kept.get(event.lane, 0.0), event.end)
        late = []
        for lane, busy in self._later.items():
            begin = kept.get(lane, 0.0)
            share = min(1.0, busy / max(self.cycles - begin, busy))
            late.append(Event(lane, begin, self.cycles, "too many to show", "", share))
        return self.events + late

    def restore(self, state: ClocksState) -> None:
        """Goes back to `state`, which can be restored again."""
        self.busy_until = dict(state.busy_until)
        self.totals = state.totals.copy()
        self.events = list(state.events)
        self._later = dict(state.later)
        self._idle = list(state.idle)
        self._counted = state.counted

    def _count(self, name: str, line: str, end: float) -> None:
        """Charges an operation for the cycles until `end` that no operation before it took.

        What runs beside a longer operation takes no time of the program:

          flood                0 to 100    100 cycles
          product beside it    0 to 90     none
          sum of both          100 to 110  10 cycles
        """
        self.totals.cycles[name, line] += max(0.0, end - self._counted)
        self._counted = max(self._counted, end)

    def _occupy(self, lane: str, name: str, line: str, start: float, end: float) -> None:
        self.totals.busy[lane] += end - start
        self._record(lane, name, line, start, end)

    def _record(
        self, lane: str, name: str, line: str, start: float, end: float, share: float = 1.0
    ) -> None:
        if end <= start:
            return
        if len(self.events) < _EVENTS:
            self.events.append(Event(lane, start, end, name, line, share))
        else:
            self._later[lane] = self._later.get(lane, 0.0) + share * (end - start)
