"""Along which axes of a mesh a collective moves, read off its groups of devices."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np

from wsekern.compiler.hlo import Instruction

_LIST = re.compile(r"\{([\d, ]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_BY_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class MeshAxes:
    """The axes of a mesh, outermost first: names, sizes, and whether the two ends are neighbors."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    rings: tuple[bool, ...]

    def of_group(self, devices: Sequence[int]) -> tuple[str, ...]:
        """The axes along which some of these devices differ."""
        places = self._places(np.array(devices))
        return tuple(n for n, p in zip(self.names, places, strict=True) if np.ptp(p))

    def is_ring(self, axes: Sequence[str]) -> bool:
        """Whether every one of these axes closes to a ring."""
        rings = dict(zip(self.names, self.rings, strict=True))
        return bool(axes) and all(rings.get(axis, False) for axis in axes)

    def direction(self, pairs: Sequence[tuple[int, int]]) -> int:
        """1 if most of the moves go up along their axis, -1 if they go down, 0 if neither."""
        if not pairs:
            return 0
        sources, targets = (self._places(np.array(side)) for side in zip(*pairs, strict=True))
        steps = np.array([t - s for s, t in zip(sources, targets, strict=True)])
        up = np.where(steps > 0, 1, np.where(steps < 0, -1, 0)).sum()
        return int(np.sign(up))

    def _places(self, devices: np.ndarray) -> tuple[np.ndarray, ...]:
        if not self.sizes or devices.max(initial=0) >= math.prod(self.sizes):
            return (devices,) if len(self.names) == 1 else tuple(devices * 0 for _ in self.names)
        return np.unravel_index(devices, self.sizes)


@functools.lru_cache(maxsize=4096)
def groups_of(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """The groups of devices among which a collective moves; () if its text does not say."""
    text = instruction.attributes
    if match := _IOTA.search(text):
        shape, dims = _numbers(match[1]), _numbers(match[2])
        order = _numbers(match[3]) if match[3] else tuple(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)
        return tuple(map(tuple, ids.reshape(shape[0], -1).tolist()))
    if match := _BY_AXES.search(text):
        axes = re.findall(r"'([^']*)'=(\d+)", match[1])
        chosen = re.findall(r"'([^']*)'", match[2])
        sizes, names = [int(size) for _, size in axes], [name for name, _ in axes]
        if not all(name in names for name in chosen):
            return ()
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        last = [names.index(name) for name in chosen]
        count = math.prod(sizes[axis] for axis in last)
        moved = np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, count)
        return tuple(map(tuple, moved.tolist()))
    begin = text.find("replica_groups={{")
    if begin < 0:
        return ()
    inner = text[begin : text.find("}}", begin) + 2]
    return tuple(_numbers(group) for group in _LIST.findall(inner))


@functools.lru_cache(maxsize=4096)
def pairs_of(instruction: Instruction) -> tuple[tuple[int, int], ...]:
    """(source, target) of every move of a permutation, without those that stay where they are."""
    begin = instruction.attributes.find("source_target_pairs={{")
    if begin < 0:
        return ()
    inner = instruction.attributes[begin : instruction.attributes.find("}}", begin) + 2]
    pairs = [_numbers(pair) for pair in _LIST.findall(inner)]
    return tuple((p[0], p[1]) for p in pairs if len(p) == 2 and p[0] != p[1])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))
