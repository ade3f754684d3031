"""This file is the roofline plot: what machines can do at most, and what programs make of it.

S. Williams, A. Waterman and D. Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", 2009. Bytes are those that a PE's memory or a chip's memory moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from wsekern.estimator.pictures import figure, output
from wsekern.estimator.report import of_wafer
from wsekern.hardware import A100, H100, Accelerator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wsekern.estimator.result import Estimate


class Roof(NamedTuple):
    """The most that a machine does."""

    name: str
    bytes_per_second: float
    flops: dict[str, float]  # by kind of operand


class RooflinePoint(NamedTuple):
    """A program on a machine; of an accelerator, on its roof."""

    machine: str
    program: str
    intensity: float  # FLOP for each byte
    flops: float  # a second
    estimated: bool


def roofline(
    estimates: Estimate | Mapping[str, Estimate],
    *,
    accelerators: Sequence[Accelerator] = (A100, H100),
    path: output.Path | None = None,
) -> Figure:
    """Roofs of the wafers and of chips beside them, with the programs' points.

    A program is under the roof of its wafer, at the operations for each byte that the PEs' memories
    move. On a chip it is on the roof, at those for each byte of its arguments and results.

    Args:
      estimates: one, or several by name.
      accelerators: chips to compare with, one of each.
      path: where to write it (.png, .svg or .pdf); None: nowhere.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no program computes anything.
      OSError: the path cannot be written.
    """
    with figure.style():
        made = draw_roofline(estimates, accelerators)
    return figure.save(made, path)


def draw_roofline(
    estimates: Estimate | Mapping[str, Estimate], accelerators: Sequence[Accelerator] = (A100, H100)
) -> Figure:
    """The plot, in the style in force."""
    named: Mapping[str, Any] = estimates if isinstance(estimates, Mapping) else {"": estimates}
    found = points(named, accelerators)
    if not found:
        raise ValueError("roofline: no program computes anything")
    tops = roofs(named, accelerators)
    made = figure.new_figure(5.4, 3.6)
    axes = made.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte", ylabel="FLOP/s")
    turns = [max(roof.flops.values()) / roof.bytes_per_second for roof in tops]
    x = np.array([min(*turns, *(p.intensity for p in found)) / 4,
                  max(*turns, *(p.intensity for p in found)) * 4])  # fmt: skip
    colors = dict(zip([roof.name for roof in tops], figure.SERIES * len(tops), strict=False))
    for roof in tops:
        for kind, top in roof.flops.items():
            at = np.array([x[0], top / roof.bytes_per_second, x[1]])
            style = "-" if kind == "16 bits" else "--"
            heights = np.minimum(at * roof.bytes_per_second, top)
            axes.plot(at, heights, style, color=colors[roof.name], lw=1.3)
    for point in found:
        color = colors[point.machine]
        face = color if point.estimated else "none"
        axes.plot(point.intensity, point.flops, "o", ms=6, mec=color, mfc=face, zorder=3)
    _name_programs(axes, found)
    _name_roofs(axes, tops, colors)
    axes.set_xlim(*x)
    figure.engineering_ticks(axes, "y")
    axes.grid(True)
    axes.plot([], [], "o", color="gray", label="program, estimated")
    axes.plot([], [], "o", color="gray", mfc="none", label="on a chip's roof")
    axes.legend(loc="best", fontsize="small")
    axes.set_title("roofline")
    return made


def roofs(estimates: Mapping[str, Any], accelerators: Sequence[Accelerator]) -> list[Roof]:
    """The roofs of the estimates' wafers and of the accelerators."""
    found = {}
    for e in estimates.values():
        pes, machine = e.wafer.size, e.machine
        memory = machine.read_bytes_per_cycle + machine.write_bytes_per_cycle
        flops = {
            kind: 2.0 * machine.fmacs_per_cycle(dtype) * pes * e.clock_hz
            for kind, dtype in (("float32", "float32"), ("16 bits", "float16"))
        }
        found[of_wafer(e)] = Roof(of_wafer(e), memory * pes * e.clock_hz, flops)
    for chip in accelerators:
        flops = {"16 bits": chip.bfloat16_flops}
        if chip.float32_flops:
            flops = {"float32": chip.float32_flops, **flops}
        found[chip.name] = Roof(chip.name, chip.memory_bytes_per_second, flops)
    return list(found.values())


def points(
    estimates: Mapping[str, Any], accelerators: Sequence[Accelerator]
) -> list[RooflinePoint]:
    """What programs do on wafers and would do on chips; without those that compute nothing."""
    found = []
    for name, e in estimates.items():
        if not e.flops or not e.cycles:
            continue
        moved = max(e.port_bytes * e.wafer.size, 1.0)
        found.append(RooflinePoint(of_wafer(e), name, e.flops / moved, e.flops_per_second, True))
        for chip in accelerators:
            seconds = e.accelerators.get(chip.name)
            if seconds:
                intensity = e.flops / max(e.host_bytes, 1.0)
                found.append(RooflinePoint(chip.name, name, intensity, e.flops / seconds, False))
    return found


def _name_programs(axes: Axes, found: Sequence[RooflinePoint]) -> None:
    """Once on wafers, and once on chips, below the lowest point."""
    lowest: dict[tuple, RooflinePoint] = {}
    for point in found:
        key = point.program, point.machine if point.estimated else ""
        if key not in lowest or point.flops < lowest[key].flops:
            lowest[key] = point
    for (program, _), point in lowest.items():
        axes.annotate(
            program, (point.intensity, point.flops), (0, -6), textcoords="offset points",
            ha="center", va="top", fontsize="small",
        )  # fmt: skip


def _name_roofs(axes: Axes, tops: Sequence[Roof], colors: Mapping[str, str]) -> None:
    """To the right of the roofs, and no nearer to one another than a line is high."""
    named = sorted((top, roof.name, kind) for roof in tops for kind, top in roof.flops.items())
    least, most = np.log10(axes.get_ylim())
    line, at = (most - least) / 20, -np.inf
    for top, name, kind in named:
        at = max(np.log10(top), at + line)
        axes.annotate(
            f"{name.removesuffix(' PEs')}, {kind}", (1.0, 10**at), (5, 0), annotation_clip=False,
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=colors[name], fontsize="small",
        )  # fmt: skip
