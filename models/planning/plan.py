"""This file is a plan: how a model lies on wafers, and what a token or a training step takes.

Decode and prefill hold weights on the wafers, as far as they have room; what has none is streamed
to each through its I/O, every time anew. Training streams all of them, as a system of wafers with
its weights in a store beside them does: to a wafer forward and backward, and the gradients back;
every wafer and every region takes sequences of its own.
"""

from __future__ import annotations

import dataclasses
import math

from models.config import DecoderConfig
from models.planning import memory
from models.planning.chips import Chips, chips_of
from models.planning.parts import BYTES, Mode, Part, parts_of
from models.planning.regions import Regions, candidates, of_side
from wsekern.hardware import ACCELERATORS, Machine

_PASSES = 3  # of training over the I/O: weights forward and backward, gradients back


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    """What a model takes of wafers; seconds are of a token, of prompts, or of a training step."""

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
    regions_needed: int | None  # to hold weights and caches; None: not one layer fits, or training
    compute_seconds: float  # with the moves from region to region
    streamed_bytes: float  # through the I/O of each wafer
    accelerators: tuple[Chips, ...]
    layouts: tuple[
        DeploymentPlan, ...
    ] = ()  # all that fit, this one too, each without those beside it

    @property
    def stream_seconds(self) -> float:
        """For which the I/O of a wafer is busy."""
        return self.streamed_bytes / self.machine.io_bytes_per_second

    @property
    def seconds(self) -> float:
        """The longer of both: weights come while others compute."""
        return max(self.compute_seconds, self.stream_seconds)

    @property
    def tokens(self) -> int:
        """In `seconds`."""
        return self.batch * (1 if self.mode == "decode" else self.context)

    @property
    def wafers_needed(self) -> int | None:
        """To hold weights and caches."""
        return self.regions_needed and math.ceil(self.regions_needed / self.regions.count)

    @property
    def fewest_wafers(self) -> int | None:
        """To hold weights and caches, in whatever regions."""
        counts = (p.wafers_needed for p in self.layouts)
        return min((count for count in counts if count), default=None)

    @property
    def resident(self) -> bool:
        """Whether weights stay on the wafers, and nothing is streamed."""
        count = self.regions_needed
        return count is not None and count <= self.wafers * self.regions.count

    @property
    def energy_per_token(self) -> float | None:
        """Joules, of whole systems under load; None where no power was published."""
        if self.machine.power_watts is None:
            return None
        return self.machine.power_watts * self.wafers * self.seconds / self.tokens

    @property
    def sram(self) -> dict[str, float]:
        """Bytes of a PE of the fullest region, by what they are for."""
        if self.mode == "train":
            return memory.training(self.parts)
        if self.resident:
            assert self.regions_needed is not None
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
    """The fastest way in which `wafers` run a model, of those that fit.

    Args:
      config: of the model.
      name: what it is called.
      parameters: how many it has.
      mode: "decode", "prefill" or "train".
      machine: what the wafers are.
      wafers: how many there are.
      context: tokens of a sequence, in the cache or in the prompt; by default the model's, at most
        4,096.
      batch: sequences; by default 1, and for training so many that the weights' way is hidden.
      side: of a region, in PEs; by default the best.
      clock_hz: cycles a second; by default the machine's own.

    Raises:
      ValueError: a number is out of range, or nothing fits; says by how much, and what would.
    """
    context = min(config.context, 4096) if context is None else context
    check(wafers=wafers, context=context, batch=1 if batch is None else batch, most=config.context)
    layouts = candidates(machine) if side is None else [of_side(machine, side)]
    found, lacking = [], {}
    for regions in layouts:
        parts = parts_of(config, mode, machine, regions.side, context, batch or 1)
        lacking[regions] = memory.lacking(parts, mode, machine, wafers * regions.count)
        if lacking[regions] <= 0:
            found.append(
                _priced(config, name, parameters, mode, machine, wafers, context, batch,
                        clock_hz or machine.clock_hz, regions, tuple(parts))
            )  # fmt: skip
    if not found:
        near = min(lacking, key=lambda r: lacking[r])
        raise ValueError(
            f"{name} does not fit {machine.name}: a PE lacks {lacking[near]:,.0f} bytes for {mode} "
            f"of {context:,} tokens a sequence; "
            + _what_fits(config, mode, near, machine, wafers, context, batch)
        )
    best = min(found, key=lambda p: p.seconds / p.tokens if mode == "train" else p.seconds)
    return dataclasses.replace(best, layouts=tuple(found))


def check(*, wafers: int, context: int, batch: int, most: int) -> None:
    """Raises ValueError where a number is out of range; `most` is the model's context."""
    limits = {"wafers": (wafers, 2048), "context": (context, most), "batch": (batch, None)}
    for what, (value, limit) in limits.items():
        if value < 1 or (limit is not None and value > limit):
            allowed = "1 or more" if limit is None else f"from 1 to {limit:,}"
            raise ValueError(f"{what}={value} must be {allowed}")


def scale_out(of: DeploymentPlan) -> list[tuple[int, float, float]]:
    """Data parallelism: wafers, seconds of the same training step, share of what is ideal."""
    counts = [2**n for n in range(of.wafers.bit_length()) if 2**n <= of.wafers]
    counts += [of.wafers] if of.wafers not in counts else []
    alone = _step_seconds(of, 1)
    return [(n, _step_seconds(of, n), alone / n / _step_seconds(of, n)) for n in counts]


def _priced(config, name, parameters, mode, machine, wafers, context, batch, clock, regions, parts):
    each = sum(part.count * part.cycles for part in parts) / clock
    pes = regions.side**2
    weights = sum(part.count * part.weights for part in parts) * pes
    count = None
    if mode == "train":
        streamed = _PASSES * weights
        if batch is None:
            rounds = math.ceil(streamed / machine.io_bytes_per_second / each)
            batch = rounds * wafers * regions.count
        compute = math.ceil(batch / wafers / regions.count) * each
    else:
        batch, used = batch or 1, wafers * regions.count
        count, streamed = memory.needed(parts, machine), 0.0
        if count is not None and count <= used:
            used = count
        else:
            stays = memory.capacity(machine) - sum(memory.streaming(parts, used).values())
            met = sum(part.count * part.weights * part.met for part in parts) * pes
            # Layers stay whole or not at all, so that a region may have room that is of no use.
            share = max(1 - stays * used * pes / weights, 1 - used / count if count else 0.0)
            streamed = share * met / wafers
        compute = each + _moves(config, machine, regions, used, context, batch, mode, clock)
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


def _moves(config, machine, regions, used, context, batch, mode, clock) -> float:
    """Seconds for which tokens are on their way from one region to the next."""
    rows = batch if mode == "decode" else context
    words = rows * config.d_model * BYTES / 4
    # Every PE hands on what it has, to the one a region's side farther; words follow on one link.
    inside = regions.side * machine.hop_cycles + words / regions.side
    between = rows * config.d_model * BYTES / machine.io_bytes_per_second
    steps = max(0, used - 1)
    across = min(steps, math.ceil(used / regions.count) - 1)
    return (steps - across) * inside / clock + across * between


def _step_seconds(of: DeploymentPlan, wafers: int) -> float:
    rounds = math.ceil(of.batch / wafers / of.regions.count)
    most = math.ceil(of.batch / of.wafers / of.regions.count)
    return max(of.compute_seconds * rounds / most, of.stream_seconds)


def _what_fits(config, mode, regions, machine, wafers, context, batch) -> str:
    """What to ask for instead, in regions of the size that lacks least."""
    asked = [(n, context) for n in _halves(batch or 1)] if mode == "decode" else []
    asked += [(1, n) for n in _halves(context)]
    for few, short in asked:
        parts = parts_of(config, mode, machine, regions.side, short, few)
        if memory.lacking(parts, mode, machine, wafers * regions.count) <= 0:
            return f"batch={few} fits" if short == context else f"context={short} fits"
    return "more wafers, or wafers of more PEs, would"


def _halves(n: int) -> list[int]:
    return [n >> k for k in range(1, n.bit_length())]
