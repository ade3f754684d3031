"""The time of a compiled program by a model: its schedule is walked with a clock for each link.

Three kinds of work are priced, and kept apart. XLA's own code takes the cycles that its compiler
estimates, where it does (on TPUs), else the longer of its FLOPs and its bytes at the chip's peaks.
Kernels (Pallas, cuDNN, cuBLAS) take the longer of their FLOPs and bytes. Transfers take their
links' time, of which only what the program waits for counts: all of a synchronous one, and of an
asynchronous one what is left when the program needs it. A loop takes its trips times its body; of a
conditional the longest branch counts.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from wsekern.compiler.hlo import Computation, Frame, Instruction, Program
from wsekern.compiler.mesh_axes import MeshAxes
from wsekern.compiler.transfers import Transfer, kind_of, transfer_of
from wsekern.compiler.trips import trip_count
from wsekern.compiler.work import work_of
from wsekern.hardware import Accelerator

_FAR = 6  # instructions from one without a line to a reader that has one


class Key(NamedTuple):
    """What transfers are summed by."""

    kind: str
    axes: tuple[str, ...]


@dataclasses.dataclass
class Sent:
    """The transfers of one kind along the same axes."""

    count: float = 0.0
    bytes: float = 0.0  # that a chip receives
    waited_bytes: float = 0.0  # of these, those that the program waits for
    waited_seconds: float = 0.0


class Place(NamedTuple):
    """An operation as a report names it."""

    operation: str  # "dot_general"
    line: str  # "model.py:12"; "" where the program does not say


@dataclasses.dataclass
class Cost:
    """What one run of a computation takes on one chip."""

    fusion_seconds: float = 0.0
    kernel_seconds: float = 0.0
    waited_seconds: float = 0.0
    cycles: float = 0.0  # the compiler's own, of `fusion_seconds`
    sent: dict[Key, Sent] = dataclasses.field(default_factory=dict)
    kernels: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    unpriced: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    places: dict[Place, float] = dataclasses.field(default_factory=dict)  # seconds
    unknown_loops: set[Place] = dataclasses.field(default_factory=set)

    @property
    def seconds(self) -> float:
        """All three kinds together."""
        return self.fusion_seconds + self.kernel_seconds + self.waited_seconds

    def add(self, other: Cost, times: float) -> None:
        """Adds `times` runs of another computation."""
        self.fusion_seconds += times * other.fusion_seconds
        self.kernel_seconds += times * other.kernel_seconds
        self.waited_seconds += times * other.waited_seconds
        self.cycles += times * other.cycles
        for key, sent in other.sent.items():
            own = self.sent.setdefault(key, Sent())
            own.count += times * sent.count
            own.bytes += times * sent.bytes
            own.waited_bytes += times * sent.waited_bytes
            own.waited_seconds += times * sent.waited_seconds
        for place, seconds in other.places.items():
            self.places[place] = self.places.get(place, 0.0) + times * seconds
        # Counted as the text has them, once each, however often they run.
        self.kernels.update(other.kernels)
        self.unpriced.update(other.unpriced)
        self.unknown_loops |= other.unknown_loops


def price(
    program: Program,
    mesh: MeshAxes,
    chip: Accelerator,
    user_line: Callable[[tuple[Frame, ...]], str],
    kernel_flops: Mapping[str, float] | None = None,
) -> Cost:
    """What one run of a compiled program takes on one chip.

    Args:
      program: the compiled program.
      mesh: of its devices, in the order of the program's partitions.
      chip: with its link rate, and the clock of the compiler's cycles if that counts any.
      user_line: the line of a stack to name in a report, "" for none.
      kernel_flops: the FLOPs of one call of a Pallas kernel, by its name.
    """
    return _Walk(program, mesh, chip, user_line, kernel_flops or {}).cost(program.main)


class _Walk:
    def __init__(
        self,
        program: Program,
        mesh: MeshAxes,
        chip: Accelerator,
        user_line: Callable[[tuple[Frame, ...]], str],
        kernel_flops: Mapping[str, float],
    ) -> None:
        self.program, self.mesh, self.chip = program, mesh, chip
        self.user_line, self.kernel_flops = user_line, kernel_flops
        self.rate = chip.link_bytes_per_second or float("inf")
        self.costs: dict[str, Cost] = {}

    def cost(self, computation: Computation) -> Cost:
        if computation.name not in self.costs:
            self.costs[computation.name] = self._run(computation)
        return self.costs[computation.name]

    def _run(self, computation: Computation) -> Cost:
        cost, clock = Cost(), _Clock()
        for one in computation.instructions:
            if one.opcode == "while":
                self._loop(cost, clock, computation, one)
            elif one.opcode == "conditional":
                branches = [self.cost(inner) for _, inner in self.program.called(one)]
                if branches:
                    self._inner(cost, clock, max(branches, key=lambda branch: branch.seconds), 1)
            elif one.opcode == "call":
                for _, inner in self.program.called(one):
                    self._inner(cost, clock, self.cost(inner), 1)
            elif not self._transfer(cost, clock, computation, one):
                self._compute(cost, clock, computation, one)
        for transfer in clock.pending.values():  # nothing says when it must have arrived
            self._note(cost, computation, transfer.transfer, 0.0)
        return cost

    def _inner(self, cost: Cost, clock: _Clock, inner: Cost, times: float) -> None:
        cost.add(inner, times)
        clock.now += times * inner.seconds

    def _loop(self, cost: Cost, clock: _Clock, computation: Computation, one: Instruction) -> None:
        body = dict(self.program.called(one)).get("body")
        if body is None:
            return
        trips = trip_count(self.program, computation, one)
        if trips is None:
            cost.unknown_loops.add(self._place(computation, one))
        self._inner(cost, clock, self.cost(body), 1 if trips is None else trips)

    def _transfer(
        self, cost: Cost, clock: _Clock, computation: Computation, one: Instruction
    ) -> bool:
        """Whether the instruction is a transfer, or its end; its time is then counted."""
        inside = [inner for _, inner in self.program.called(one)]
        targets = {each.target for inner in inside for each in inner.instructions}
        collective = next((e for i in inside for e in i.instructions if kind_of(e)), None)
        chain = "" if collective is None else _chain(collective)
        if one.opcode.endswith("-done") or "AsyncCollectiveDone" in targets:
            started = clock.pending.pop(chain or next(iter(one.operands), ""), None)
            if started is not None:
                waited = max(0.0, started.end - clock.now)
                clock.now += waited
                self._note(cost, computation, started.transfer, waited, one)
            if "AsyncCollectiveDone" in targets:  # what else the fusion does
                self._compute(cost, clock, computation, one)
            return True
        starts = one.opcode.endswith("-start") or "AsyncCollectiveStart" in targets
        middle = chain in clock.pending if chain else False
        if middle or (collective is not None and one.opcode == "fusion" and not starts):
            # A fusion that works while the transfer of its chain goes on.
            if not middle and collective is not None:
                self._start(cost, clock, computation, one, one.name, waits=True)
            self._compute(cost, clock, computation, one)
            return True
        if kind_of(one) is None and not (starts and collective is not None):
            return False
        self._start(cost, clock, computation, one, chain or one.name, waits=not starts)
        if "AsyncCollectiveStart" in targets:
            self._compute(cost, clock, computation, one)
        return True

    def _start(
        self, cost: Cost, clock: _Clock, computation: Computation, one: Instruction, key: str,
        waits: bool,
    ) -> None:  # fmt: skip
        transfer = transfer_of(self.program, computation, one, self.mesh, self.rate)
        assert transfer is not None
        begin = max([clock.now, *(clock.free.get(link, 0.0) for link in transfer.links)])
        end = begin + transfer.seconds
        clock.free |= dict.fromkeys(transfer.links, end)
        if waits:
            waited, clock.now = end - clock.now, end
            self._note(cost, computation, transfer, waited, one)
        else:
            clock.pending[key] = _Pending(transfer, end)

    def _note(
        self, cost: Cost, computation: Computation, transfer: Transfer, waited: float,
        one: Instruction | None = None,
    ) -> None:  # fmt: skip
        sent = cost.sent.setdefault(Key(transfer.kind, transfer.axes), Sent())
        sent.count += 1
        sent.bytes += transfer.bytes
        share = min(1.0, waited / transfer.seconds) if transfer.seconds else 0.0
        sent.waited_bytes += share * transfer.bytes
        sent.waited_seconds += waited
        cost.waited_seconds += waited
        if waited and one is not None:
            place = self._place(computation, one, transfer.kind)
            cost.places[place] = cost.places.get(place, 0.0) + waited

    def _compute(
        self, cost: Cost, clock: _Clock, computation: Computation, one: Instruction
    ) -> None:
        work = work_of(self.program, computation, one, self.chip, self.kernel_flops)
        if work is None:
            return
        clock.now += work.seconds
        if work.kernel:
            cost.kernels[work.kernel] += 1
            cost.kernel_seconds += work.seconds
            if work.lacks_flops:
                cost.unpriced[work.kernel] += 1
        else:
            cost.fusion_seconds += work.seconds
            cost.cycles += work.cycles
        place = self._place(computation, one, work.kernel)
        cost.places[place] = cost.places.get(place, 0.0) + work.seconds

    def _place(self, computation: Computation, one: Instruction, name: str = "") -> Place:
        named = self._named(one)
        operation = named.operation.rsplit("/", 1)[-1] or named.opcode
        reader: Instruction | None = one
        # What the partitioner adds, such as a gather, has no line of its own: its reader's counts.
        for _ in range(_FAR):
            if named.frame is not None or reader is None:
                break
            reader = computation.readers.get(reader.name)
            named = one if reader is None else self._named(reader)
        frames = self.program.frames.get(named.frame or 0, ())
        return Place(name or operation, self.user_line(frames))

    def _named(self, one: Instruction) -> Instruction:
        """The instruction, or the last one in its computation that says where it is from."""
        if one.operation or one.frame:
            return one
        for _, inner in self.program.called(one):
            for each in reversed(inner.instructions):
                if each.operation or each.frame:
                    return each
        return one


class _Pending(NamedTuple):
    """A transfer on its way, and when it has arrived."""

    transfer: Transfer
    end: float


class _Clock:
    """The time in one run of a computation, and when each link is free again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.free: dict[tuple[str, int], float] = {}
        self.pending: dict[str, _Pending] = {}


def _chain(collective: Instruction) -> str:
    match = re.search(r'chain_id="(\d+)"', collective.attributes)
    return f"chain {match[1]}" if match else ""
