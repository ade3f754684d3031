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

_BEGIN = "AsyncCollectiveStart"
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
    """The costs of a program's computations, each of which is walked once."""

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
        self.costs: dict[str, Cost] = {}
        self.begun = {
            _chain(one)
            for computation in program.computations.values()
            if any(each.target == _BEGIN for each in computation.instructions)
            for one in computation.instructions
            if kind_of(one)
        }

    def cost(self, computation: Computation) -> Cost:
        """The cost of one run of a computation."""
        if computation.name not in self.costs:
            self.costs[computation.name] = _Run(self, computation).to_the_end()
        return self.costs[computation.name]

    def place(self, computation: Computation, one: Instruction, name: str = "") -> Place:
        """The operation that an instruction belongs to, called `name` if that is given."""
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


class _Run:
    """One run of a computation: the time so far, and which links are taken until when."""

    def __init__(self, walk: _Walk, computation: Computation) -> None:
        self.walk, self.computation = walk, computation
        self.cost, self.now = Cost(), 0.0
        self.free: dict[tuple[str, int], float] = {}  # when a link is free again
        self.pending: dict[str, _Pending] = {}

    def to_the_end(self) -> Cost:
        """The cost of the whole run."""
        for one in self.computation.instructions:
            inner = [computation for _, computation in self.walk.program.called(one)]
            if one.opcode == "while":
                self._loop(one)
            elif one.opcode == "conditional" and inner:
                branches = map(self.walk.cost, inner)
                self._add(max(branches, key=lambda branch: branch.seconds), 1)
            elif one.opcode == "call" and inner:
                self._add(self.walk.cost(inner[0]), 1)
            else:
                self._step(one, inner)
        for key in list(self.pending):  # they arrive before the next run begins
            self._arrive(key, None)
        return self.cost

    def _loop(self, one: Instruction) -> None:
        body = dict(self.walk.program.called(one)).get("body")
        if body is None:
            return
        trips = trip_count(self.walk.program, self.computation, one)
        if trips is None:
            self.cost.unknown_loops.add(self.walk.place(self.computation, one))
        self._add(self.walk.cost(body), 1 if trips is None else trips)

    def _add(self, inner: Cost, times: float) -> None:
        self.cost.add(inner, times)
        self.now += times * inner.seconds

    def _step(self, one: Instruction, inner: list[Computation]) -> None:
        """An instruction that computes, moves, or does both.

        A TPU's asynchronous collective may be a chain of fusions, in each of which the collective
        stands: the first ends with "AsyncCollectiveStart", the last with "AsyncCollectiveDone", and
        those between work while it goes on, maybe in a loop between the first and the last.
        """
        inside = [each for computation in inner for each in computation.instructions]
        targets = {each.target for each in inside}
        collective = next((each for each in inside if kind_of(each)), None)
        key = one.name if collective is None else _chain(collective) or one.name
        if one.opcode.endswith("-done"):
            self._arrive(next(iter(one.operands), ""), one)
        elif one.opcode in ("async-start", "async-update"):
            self._hand_over(one)
        elif "AsyncCollectiveDone" in targets:
            self._arrive(key, one)
            self._compute(one)
        elif _BEGIN in targets:
            self._depart(one, key)
            self._compute(one)
        elif kind_of(one):
            self._depart(one, key)
            if not one.opcode.endswith("-start"):
                self._arrive(key, one)
        else:
            if collective is not None and not (key in self.pending or key in self.walk.begun):
                self._depart(one, key)
                self._arrive(key, one)
            self._compute(one)

    def _hand_over(self, one: Instruction) -> None:
        """Something is begun elsewhere on the chip, perhaps a transfer.

        To the sparse cores of a TPU the program comes first, by an `async-start` without operands,
        and what to send follows by an `async-update`.
        """
        if one.opcode == "async-start":
            if one.operands:
                self._depart(one, one.name)
            return
        start = self.computation.by_name.get(next(iter(one.operands), ""))
        if start is None:
            return
        if start.name in self.pending:  # it goes on, and ends under the update's name
            self.pending[one.name] = self.pending.pop(start.name)
        elif not start.operands:
            self._depart(start, one.name)

    def _depart(self, one: Instruction, key: str) -> None:
        """Begins a transfer, as soon as its links are free."""
        walk = self.walk
        rate = walk.chip.link_bytes_per_second or float("inf")
        transfer = transfer_of(walk.program, self.computation, one, walk.mesh, rate)
        if transfer is None:
            return
        begin = max([self.now, *(self.free.get(link, 0.0) for link in transfer.links)])
        self.free |= dict.fromkeys(transfer.links, begin + transfer.seconds)
        self.pending[key] = _Pending(transfer, begin + transfer.seconds)

    def _arrive(self, key: str, one: Instruction | None) -> None:
        """Waits for a transfer, if it is still on its way."""
        if key not in self.pending:
            return
        transfer, end = self.pending.pop(key)
        waited = max(0.0, end - self.now)
        self.now += waited
        sent = self.cost.sent.setdefault(Key(transfer.kind, transfer.axes), Sent())
        sent.count += 1
        sent.bytes += transfer.bytes
        share = min(1.0, waited / transfer.seconds) if transfer.seconds else 0.0
        sent.waited_bytes += share * transfer.bytes
        sent.waited_seconds += waited
        self.cost.waited_seconds += waited
        if waited and one is not None:
            self._count(self.walk.place(self.computation, one, transfer.kind), waited)

    def _compute(self, one: Instruction) -> None:
        walk, cost = self.walk, self.cost
        work = work_of(walk.program, self.computation, one, walk.chip, walk.kernel_flops)
        if work is None:
            return
        self.now += work.seconds
        if work.kernel:
            cost.kernels[work.kernel] += 1
            cost.kernel_seconds += work.seconds
            if work.lacks_flops:
                cost.unpriced[work.kernel] += 1
        else:
            cost.fusion_seconds += work.seconds
            cost.cycles += work.cycles
        self._count(walk.place(self.computation, one, work.kernel), work.seconds)

    def _count(self, place: Place, seconds: float) -> None:
        self.cost.places[place] = self.cost.places.get(place, 0.0) + seconds


def _chain(collective: Instruction) -> str:
    """The name of the chain of fusions that a collective stands in; "" for none."""
    chain = re.search(r'chain_id="(\d+)"', collective.attributes)
    channel = re.search(r"channel_id=(\d+)", collective.attributes)
    return f"chain {chain[1]}, channel {channel and channel[1]}" if chain else ""
