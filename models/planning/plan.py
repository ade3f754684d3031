"""Plan a deployment: how a model lies on wafers, and the time of a token or a training step.

Decode and prefill keep weights on the wafers as far as there is room; the others are streamed to
each wafer through its I/O, every time anew. Training streams all weights from a store beside the
wafers: to each wafer for the forward and again for the backward pass, and the gradients back. Every
wafer and every region takes sequences of its own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from models.config import DecoderConfig
from models.planning import memory
from models.planning.chips import Chips, chips_of
from models.planning.parts import BYTES, Mode, Part, parts_of
from models.planning.regions import Regions, candidates, of_side
from wsekern.hardware import ACCELERATORS, Machine, check_clock
from wsekern.moved import moved_names

if not TYPE_CHECKING:  # a type checker would take every name for one of this module
    __getattr__ = moved_names(__name__)

_MOST_BATCH = 2**31 - 1  # sequences
_PASSES = 3  # transfers of a training step: weights forward, weights backward, gradients back


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    """A model on wafers; seconds are for one token, for the prompts, or for a training step."""

    model: str
    parameters: int
    mode: Mode
    machine: Machine
    wafers: int
    context: int  # tokens of a sequence
    batch: int  # sequences
    clock_hz: float
    regions: Regions
    parts: tuple[Part, ...]
    regions_needed: int | None  # to store weights and caches; None: no layer fits, or training
    compute_seconds: float  # including the moves from region to region
    streamed_bytes: float  # through the I/O of each wafer
    accelerators: tuple[Chips, ...]
    layouts: tuple[DeploymentPlan, ...] = ()  # all layouts that fit, this one included

    @property
    def stream_seconds(self) -> float:
        """Seconds that the I/O of a wafer is busy."""
        return self.streamed_bytes / self.machine.io_bytes_per_second

    @property
    def seconds(self) -> float:
        """The longer of computing and streaming: they overlap."""
        return max(self.compute_seconds, self.stream_seconds)

    @property
    def tokens(self) -> int:
        """Tokens that are processed in `seconds`."""
        return self.batch * (1 if self.mode == "decode" else self.context)

    @property
    def wafers_needed(self) -> int | None:
        """Wafers to store weights and caches."""
        return self.regions_needed and math.ceil(self.regions_needed / self.regions.count)

    @property
    def fewest_wafers(self) -> int | None:
        """Wafers to store weights and caches, in regions of the best size for that."""
        counts = (p.wafers_needed for p in self.layouts)
        return min((count for count in counts if count), default=None)

    @property
    def resident(self) -> bool:
        """Whether all weights stay on the wafers, and nothing is streamed."""
        count = self.regions_needed
        return count is not None and count <= self.wafers * self.regions.count

    @property
    def energy_per_token(self) -> float | None:
        """Joules, for whole systems under load; None if the machine's power is not published."""
        if self.machine.power_watts is None:
            return None
        return self.machine.power_watts * self.wafers * self.seconds / self.tokens

    @property
    def sram(self) -> dict[str, float]:
        """Bytes of a PE of the fullest region, by use."""
        if self.mode == "train":
            return memory.training(self.parts)
        if self.resident:
            assert self.regions_needed is not None  # for type checkers: `resident` implies it
            return memory.resident(self.parts, self.regions_needed)
        used = memory.streaming(self.parts, self.wafers * self.regions.count)
        return {"weights that stay": memory.capacity(self.machine) - sum(used.values())} | used


def plan(
    config: DecoderConfig,
    *,
    name: str,
    parameters: int,
    mode: Mode,
    machine: Machine,
    wafers: int = 1,
    context: int | None = None,
    batch: int | None = None,
    side: int | None = None,
    clock_hz: float | None = None,
) -> DeploymentPlan:
    """The fastest layout of a model on `wafers` wafers, of all that fit.

    Args:
      config: the model's.
      name: the model's, for the report.
      parameters: how many the model has.
      mode: "decode", "prefill" or "train".
      machine: the kind of wafer.
      wafers: how many wafers.
      context: tokens of a sequence, in the cache or in the prompt; by default the model's context,
        at most 4,096.
      batch: sequences; by default 1; for training, as many as hide the streaming of the weights.
      side: of a region, in PEs; by default the fastest.
      clock_hz: cycles a second; by default the machine's.

    Raises:
      ValueError: a number is out of range, or nothing fits; the message says how many bytes a PE
        lacks, and which batch or context would fit.
    """
    context = min(config.context, 4096) if context is None else context
    check(wafers=wafers, context=context, batch=1 if batch is None else batch, most=config.context)
    if clock_hz is not None:
        check_clock("clock_hz", clock_hz)
    fitting, lacking = [], {}
    for regions in candidates(machine) if side is None else [of_side(machine, side)]:
        parts = parts_of(config, mode, machine, regions.side, context, batch or 1)
        lacking[regions] = memory.lacking(parts, mode, machine, wafers * regions.count)
        if lacking[regions] <= 0:
            fitting.append(
                _price(config, name, parameters, mode, machine, wafers, context, batch,
                       machine.clock_hz if clock_hz is None else clock_hz, regions, tuple(parts))
            )  # fmt: skip
    if not fitting:
        near = min(lacking, key=lambda r: lacking[r])
        raise ValueError(
            f"{name} does not fit {machine.name}: a PE lacks {lacking[near]:,.0f} bytes for {mode} "
            f"of {context:,} tokens a sequence; "
            + _what_fits(config, mode, near, machine, wafers, context, batch)
        )
    best = min(fitting, key=lambda p: p.seconds / p.tokens if mode == "train" else p.seconds)
    return dataclasses.replace(best, layouts=tuple(fitting))


def check(*, wafers: int, context: int, batch: int, most: int) -> None:
    """Raises ValueError if a number is out of range; `most` is the model's context."""
    limits = {"wafers": (wafers, 2048), "context": (context, most), "batch": (batch, _MOST_BATCH)}
    for name, (value, limit) in limits.items():
        if not 1 <= value <= limit:
            raise ValueError(f"{name}={value} must be from 1 to {limit:,}")


def scale_out(plan: DeploymentPlan) -> list[tuple[int, float, float]]:
    """The same training step on fewer wafers: (wafers, seconds, share of ideal scaling)."""
    counts = [2**n for n in range(plan.wafers.bit_length()) if 2**n <= plan.wafers]
    counts += [plan.wafers] if plan.wafers not in counts else []
    alone = _step_seconds(plan, 1)
    return [(n, _step_seconds(plan, n), alone / n / _step_seconds(plan, n)) for n in counts]


def _price(
    config: DecoderConfig,
    name: str,
    parameters: int,
    mode: Mode,
    machine: Machine,
    wafers: int,
    context: int,
    batch: int | None,
    clock: float,
    regions: Regions,
    parts: tuple[Part, ...],
) -> DeploymentPlan:
    """The plan for one way to cut the wafers into regions."""
    one_pass = sum(part.count * part.cycles for part in parts) / clock
    pes = regions.side**2
    weights = sum(part.count * part.weights for part in parts) * pes
    count = None
    if mode == "train":
        streamed = _PASSES * weights
        if batch is None:
            # As many sequences a region as make computing take longer than streaming.
            rounds = math.ceil(streamed / machine.io_bytes_per_second / one_pass)
            batch = rounds * wafers * regions.count
        compute = math.ceil(batch / wafers / regions.count) * one_pass
    else:
        batch, used = batch or 1, wafers * regions.count
        count, streamed = memory.regions_needed(parts, machine), 0.0
        if count is not None and count <= used:
            used = count
        else:
            room = memory.capacity(machine) - sum(memory.streaming(parts, used).values())
            needed = sum(part.count * part.weights * part.met for part in parts) * pes
            # A layer stays whole or not at all, so some room of a region may be of no use: the
            # share that is streamed is no less than that of the regions that are missing.
            share = max(1 - room * used * pes / weights, 1 - used / count if count else 0.0)
            streamed = share * needed / wafers
        compute = one_pass + _moves(config, machine, regions, used, context, batch, mode, clock)
        if mode == "prefill":  # sequences follow one another through the regions
            compute *= 1 + (batch - 1) / used
    return DeploymentPlan(
        model=name,
        parameters=parameters,
        mode=mode,
        machine=machine,
        wafers=wafers,
        context=context,
        batch=batch,
        clock_hz=clock,
        regions=regions,
        parts=parts,
        regions_needed=count,
        compute_seconds=compute,
        streamed_bytes=streamed,
        accelerators=tuple(
            chips_of(config, parameters, mode, chip, context, batch) for chip in ACCELERATORS
        ),
    )


def _moves(
    config: DecoderConfig,
    machine: Machine,
    regions: Regions,
    used: int,
    context: int,
    batch: int,
    mode: Mode,
    clock: float,
) -> float:
    """Seconds that tokens are on their way from region to region, over `used` regions."""
    rows = batch if mode == "decode" else context
    words = rows * config.d_model * BYTES / 4
    # Every PE sends its words `side` hops on; those of a row or column share one link, one a cycle.
    inside = regions.side * machine.hop_cycles + words / regions.side
    between = rows * config.d_model * BYTES / machine.io_bytes_per_second
    steps = max(0, used - 1)
    across = min(steps, math.ceil(used / regions.count) - 1)
    return (steps - across) * inside / clock + across * between


def _step_seconds(plan: DeploymentPlan, wafers: int) -> float:
    """Seconds of the training step of `plan` on `wafers` wafers."""
    rounds = math.ceil(plan.batch / wafers / plan.regions.count)
    planned = math.ceil(plan.batch / plan.wafers / plan.regions.count)
    return max(plan.compute_seconds * rounds / planned, plan.stream_seconds)


def _what_fits(
    config: DecoderConfig,
    mode: Mode,
    regions: Regions,
    machine: Machine,
    wafers: int,
    context: int,
    batch: int | None,
) -> str:
    """What to ask for instead: a smaller batch, else a shorter context, else more wafers."""
    requests = [(n, context) for n in _halves(batch or 1)] if mode == "decode" else []
    requests += [(1, n) for n in _halves(context)]
    for few, short in requests:
        parts = parts_of(config, mode, machine, regions.side, short, few)
        if memory.lacking(parts, mode, machine, wafers * regions.count) <= 0:
            return f"batch={few} fits" if short == context else f"context={short} fits"
    return "more wafers, or wafers of more PEs, would"


def _halves(n: int) -> list[int]:
    """n/2, n/4, ... down to 1."""
    return [n >> k for k in range(1, n.bit_length())]
