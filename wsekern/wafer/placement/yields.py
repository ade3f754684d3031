"""A Monte-Carlo estimate of yield: the rectangle that a wafer still has, by its density of faults.

For each density many wafers are drawn. Each is asked for its largest rectangle, and whether it has
the whole rectangle that programs of its machine can use.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.stats

from wsekern.hardware import Machine

DENSITIES = (0.001, 0.01, 0.03, 0.05, 0.06, 0.07, 0.08, 0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harvest:
    """What is left of the wafers drawn at one density of faults."""

    density: float  # the share of PEs that are faulty
    whole: float  # the share of wafers that have all that a program can use
    rectangle: tuple[int, int]  # the largest (height, width) of the median wafer
    share: float  # of all PEs that are made, those in that rectangle
    worst: int  # columns of the narrowest wafer's rectangle, at the height that programs can use
    untouched: float  # the share of rows without a fault: all that skipping faulty rows would keep


def harvest(
    machine: Machine,
    densities: Sequence[float] = DENSITIES,
    *,
    wafers: int = 1000,
    seed: int = 0,
) -> list[Harvest]:
    """What is left of a machine's wafers at each density of faults.

    Every PE is faulty with the same probability, independently of the others. A row keeps its good
    PEs, as `place` uses them; so one number is drawn for each row, how many these are.

    Args:
      machine: its physical grid and usable rectangle are taken.
      densities: shares of PEs that are faulty, 0 to 1.
      wafers: how many are drawn for each density.
      seed: of numpy's generator.

    Raises:
      ValueError: a density is not from 0 to 1, or `wafers` is not positive.
    """
    if wafers < 1 or not all(0 <= density <= 1 for density in densities):
        raise ValueError(
            f"harvest: wafers={wafers} must be 1 or more, densities={list(densities)} from 0 to 1"
        )
    rng = np.random.default_rng(seed)
    return [_harvest_at(machine, density, wafers, rng) for density in densities]


def table(results: Sequence[Harvest]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| faulty PEs | wafers with the whole rectangle | largest rectangle, median | of all PEs | "
        "narrowest at full height | rows without a fault |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {h.density:.2%} | {h.whole:.1%} | {h.rectangle[0]} x {h.rectangle[1]} | {h.share:.1%} |"
        f" {h.worst} | {h.untouched:.2%} |"
        for h in results
    ]
    return "\n".join(lines)


def _harvest_at(machine: Machine, density: float, wafers: int, rng: np.random.Generator) -> Harvest:
    rows, columns = machine.physical
    # Drawn through the distribution: numpy's own `binomial` differs from one version to another.
    below = scipy.stats.binom.cdf(np.arange(columns), columns, 1 - density)
    good = np.searchsorted(below, rng.random((wafers, rows)), side="right")
    # The widest h rows of a wafer make a rectangle as wide as the h-th of them.
    widths = np.sort(good, axis=1)[:, ::-1]
    areas = widths * np.arange(1, rows + 1)
    best = areas.argmax(1)
    size = areas.max(1)
    median = int(np.argsort(size)[wafers // 2])
    full = widths[:, machine.usable_height - 1]
    return Harvest(
        density=density,
        whole=float((full >= machine.usable_width).mean()),
        rectangle=(int(best[median]) + 1, int(widths[median, best[median]])),
        share=float(size[median] / (rows * columns)),
        worst=int(full.min()),
        untouched=float((good == columns).mean()),
    )
