"""What a walk over a program adds up: words, cycles and operations of one PE."""

from __future__ import annotations

import collections
import dataclasses
import functools
from typing import Any

from wsekern.estimator.links.loads import LinkPattern

# A key that was never counted reads as zero.
_zeros: Any = functools.partial(collections.defaultdict, float)


@dataclasses.dataclass(kw_only=True)
class Totals:
    """Sums over everything that a walk has met so far, for the PE that stands for all."""

    moves: int = 0  # collectives
    received: float = 0.0  # 32-bit words that reach the PE
    hops: float = 0.0  # hops that those words take, added up
    port_bytes: float = 0.0  # read from the PE's memory and written to it
    flops: dict[str, float] = dataclasses.field(default_factory=_zeros)  # by dtype
    busy: dict[str, float] = dataclasses.field(default_factory=_zeros)  # cycles, by lane
    # Of the busiest link in each direction, in 32-bit words, by lane.
    words: dict[str, float] = dataclasses.field(default_factory=_zeros)
    # Words of a tile that moved by each pattern; from these follows what every link carries.
    tiles: dict[LinkPattern, float] = dataclasses.field(default_factory=_zeros)
    # Cycles of the program by (operation, source line); see `Clocks._count`.
    cycles: dict[tuple[str, str], float] = dataclasses.field(default_factory=_zeros)

    def copy(self) -> Totals:
        """The sums so far, which do not grow with the walk."""
        return dataclasses.replace(
            self,
            flops=self.flops.copy(),
            busy=self.busy.copy(),
            words=self.words.copy(),
            tiles=self.tiles.copy(),
            cycles=self.cycles.copy(),
        )

    def repeat(self, since: Totals, times: int) -> None:
        """Adds what was counted after the copy `since`, so many times more."""
        self.moves += (self.moves - since.moves) * times
        self.received += (self.received - since.received) * times
        self.hops += (self.hops - since.hops) * times
        self.port_bytes += (self.port_bytes - since.port_bytes) * times
        _repeat(self.flops, since.flops, times)
        _repeat(self.busy, since.busy, times)
        _repeat(self.words, since.words, times)
        _repeat(self.tiles, since.tiles, times)
        _repeat(self.cycles, since.cycles, times)


def _repeat(now: dict[Any, float], since: dict[Any, float], times: int) -> None:
    for key, value in now.items():
        now[key] = value + (value - since.get(key, 0.0)) * times
