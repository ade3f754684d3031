"""This file is what a PE of a region has to hold, by what it is for: bytes, of one PE.

Weights that do not stay come one after another, each while the one before is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models.planning.parts import Mode, Part
from wsekern.hardware import Machine


def capacity(machine: Machine) -> int:
    """What data may take."""
    return machine.sram_bytes - machine.code_bytes


def needed(parts: Sequence[Part], machine: Machine) -> int | None:
    """How many regions hold all weights and caches at once; None where not even one layer fits.

    Parts are taken in the order in which a token meets them, and a region is filled before the
    next. Layers of different kinds count as their mean: they take turns.
    """
    free = capacity(machine) - _working(parts)
    if any(part.weights + part.cache > free for part in parts):
        return None
    each = _mean(parts, "weights") + _mean(parts, "cache")
    regions, left = 1, free
    for item in (*[each] * _layers(parts), parts[-1].weights):
        if item > left + 1e-6:
            regions, left = regions + 1, free
        left -= item
    return regions


def resident(parts: Sequence[Part], regions: int) -> dict[str, float]:
    """Where `regions` hold the model, and nothing is streamed."""
    layers = math.ceil(_layers(parts) / regions)
    weights, cache = (layers * _mean(parts, name) for name in ("weights", "cache"))
    return {"weights": weights, "cache": cache, "working": _working(parts)}


def streaming(parts: Sequence[Part], regions: int) -> dict[str, float]:
    """What `regions` need beside weights that stay; caches always do."""
    held = resident(parts, regions)
    return {"weights on their way": 2 * _piece(parts)} | {k: held[k] for k in ("cache", "working")}


def training(parts: Sequence[Part]) -> dict[str, float]:
    """What a region needs that runs all layers, of which it keeps the inputs."""
    return {
        "weights": 2 * _piece(parts),
        "gradients": _piece(parts),
        "kept": sum(part.count * part.kept for part in parts),
        "working": _working(parts),
    }


def lacking(parts: Sequence[Part], mode: Mode, machine: Machine, regions: int) -> float:
    """What a PE lacks, however much is streamed; 0 or less where it fits."""
    if mode == "train":
        return sum(training(parts).values()) - capacity(machine)
    count = needed(parts, machine)
    if count is not None and count <= regions:
        return 0.0
    return sum(streaming(parts, regions).values()) - capacity(machine)


def _layers(parts: Sequence[Part]) -> int:
    return sum(part.count for part in parts if part.is_layer)


def _mean(parts: Sequence[Part], name: str) -> float:
    whole = sum(part.count * getattr(part, name) for part in parts if part.is_layer)
    return whole / _layers(parts)


def _working(parts: Sequence[Part]) -> float:
    return max(part.working for part in parts)


def _piece(parts: Sequence[Part]) -> float:
    return max(part.piece for part in parts)
