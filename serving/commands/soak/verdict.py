"""Whether a server stayed as it was."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serving.commands.soak.process import Holdings

_WARM_UP = 0.25  # of the time, in which caches fill
_FEW_BYTES = 8 << 20  # that memory may grow by in any case
_FEW_PERCENT = 0.05  # of itself, likewise
_FEW_FILES = 2  # file descriptors, likewise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at some time.

    Args:
      time: seconds since the load began.
      holdings: of its process.
      requests: that had ended.
    """

    time: float
    holdings: Holdings
    requests: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One part of the verdict.

    Args:
      name: what is checked.
      is_good: whether it is as it must be.
      found: the figures.
    """

    name: str
    is_good: bool
    found: str


def check_memory(samples: Sequence[Sample]) -> Check:
    """Whether memory is flat after the first quarter, by a straight line through the samples."""
    end = max(sample.time for sample in samples)
    warm = [sample for sample in samples if sample.time >= _WARM_UP * end]
    times = np.array([sample.time for sample in warm])
    memory = np.array([sample.holdings.memory for sample in warm], float)
    slope = float(np.polyfit(times, memory, 1)[0]) if len(set(times)) > 1 else 0.0
    growth = slope * float(times[-1] - times[0])
    allowed = max(_FEW_BYTES, _FEW_PERCENT * float(np.median(memory)))
    found = (
        f"{memory[0] / 1e6:,.1f} MB after a quarter of the time, {memory[-1] / 1e6:,.1f} MB at the "
        f"end, {memory.max() / 1e6:,.1f} MB at most; slope {60 * slope / 1e6:+.2f} MB a minute, "
        f"{growth / 1e6:+.1f} MB in all of at most {allowed / 1e6:.1f}"
    )
    return Check(name="memory", is_good=growth <= allowed, found=found)


def check_files(
    idle_before: Holdings, idle_after: Holdings, samples: Sequence[Sample] = ()
) -> Check:
    """Whether an idle server has as many file descriptors open as before the load."""
    before, after = idle_before.files, idle_after.files
    most = max([before, after, *(sample.holdings.files for sample in samples)])
    found = f"{before} before, {most} at most, {after} after"
    return Check(name="file descriptors", is_good=after <= before + _FEW_FILES, found=found)


def check_held(engines: Sequence[Mapping[str, Any]]) -> Check:
    """Whether no engine has a slot, a page or a waiting request, and no page is missing.

    Args:
      engines: of `/slots?format=full`.
    """
    held = {
        "slots": sum(len(one["slots"]) for one in engines),
        "waiting": sum(one["waiting"] for one in engines),
        "pages held": sum(one["pages_held"] for one in engines),
        "pages missing": sum(
            one["pages_total"] - one["pages_free"] - one["pages_evictable"] - one["pages_held"]
            for one in engines
        ),
    }
    found = ", ".join(f"{count} {name}" for name, count in held.items())
    return Check(name="held when idle", is_good=not any(held.values()), found=found)


def check_answers(outcomes: Mapping[tuple[str, str], int], failures: Mapping[str, int]) -> Check:
    """Whether every request had the answer that it must have.

    Args:
      outcomes: how many, by kind and outcome.
      failures: how many, by what went wrong.
    """
    counts: collections.Counter[str] = collections.Counter()
    for (_, outcome), count in outcomes.items():
        counts[outcome] += count
    found = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
    is_good = counts["answered"] > 0 and not failures
    return Check(name="answers", is_good=is_good, found=found or "none")
