"""Memory of one PE of a region, in bytes, by what it is used for.

Weights that are streamed arrive one matrix after another, each while the one before is in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from models.planning.parts import Mode, Part
from wsekern.hardware import Machine


def capacity(machine: Machine) -> int:
    """Bytes of a PE for data: its SRAM without the code."""
    return machine.sram_bytes - machine.code_bytes


def regions_needed(parts: Sequence[Part], machine: Machine) -> int | None:
    """How many regions store all weights and caches; None if not even one layer fits in a region.

    A region is filled with layers, in the order in which a token passes them, before the next one.
    Layers of different kinds alternate, so each counts as their mean.
    """
    free = capacity(machine) - _working(parts)
    if any(part.weights + part.cache > free for part in parts):
        return None
    layer = _mean(parts, "weights") + _mean(parts, "cache")
    regions, unused = 1, free
    for item in (*[layer] * _layers(parts), parts[-1].weights):
        if item > unused + 1e-6:
            regions, unused = regions + 1, free
        unused -= item
    return regions


def resident(parts: Sequence[Part], regions: int) -> dict[str, float]:
    """Bytes of a PE if `regions` regions store the whole model and nothing is streamed."""
    layers = math.ceil(_layers(parts) / regions)
    weights, cache = (layers * _mean(parts, name) for name in ("weights", "cache"))
    return {"weights": weights, "cache": cache, "working": _working(parts)}


def streaming(parts: Sequence[Part], regions: int) -> dict[str, float]:
    """Bytes of a PE besides resident weights, if weights are streamed; caches always stay."""
    # Twice the largest weight: one arrives while the other is in use.
    whole = resident(parts, regions)
    return {"weights on their way": 2 * _piece(parts)} | {k: whole[k] for k in ("cache", "working")}


def training(parts: Sequence[Part]) -> dict[str, float]:
    """Bytes of a PE in training: a region runs all layers and keeps the input of each."""
    return {
        "weights": 2 * _piece(parts),
        "gradients": _piece(parts),
        "kept": sum(part.count * part.kept for part in parts),
        "working": _working(parts),
    }


def lacking(parts: Sequence[Part], mode: Mode, machine: Machine, regions: int) -> float:
    """Bytes that a PE lacks even if all weights are streamed; 0 or less if the model fits."""
    if mode == "train":
        return sum(training(parts).values()) - capacity(machine)
    count = regions_needed(parts, machine)
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
