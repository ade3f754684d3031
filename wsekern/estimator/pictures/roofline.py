"""The roofline plot: what machines can do at most, and what programs reach.

S. Williams, A. Waterman and D. Patterson, "Roofline: An Insightful Visual Performance Model for
Multicore Architectures", 2009. Bytes are those that the memories of PEs, or of a chip, move.
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
    """The most that a machine can do."""

    name: str
    bytes_per_second: float
    flops: dict[str, float]  # FLOP/s, by kind of operand: "float32", "16 bits"


class RooflinePoint(NamedTuple):
    """A program on a machine; on an accelerator it is assumed to reach the roof."""

    machine: str
    program: str
    intensity: float  # FLOP for each byte
    flops: float  # FLOP/s
    estimated: bool  # by the estimator; else the machine's roof


def roofline(
    estimates: Estimate | Mapping[str, Estimate],
    *,
    accelerators: Sequence[Accelerator] | None = None,
    path: output.Path | None = None,
) -> Figure:
    """The rooflines of wafers and chips, with a point for each program, as a matplotlib figure.

    On its wafer, a program lies under the roof; its intensity is its FLOP for each byte that the
    PEs' memories move. On a chip it is drawn on the roof, as the best case; its intensity there is
    its FLOP for each byte of arguments and results. A notebook shows the figure by itself.

    Args:
      estimates: an estimate, or several by name.
      accelerators: chips to compare with, one of each; by default A100 and H100.
      path: where to write it (.png, .svg or .pdf); None: nowhere.

    Raises:
      ImportError: matplotlib is not installed (`pip install -e '.[viz]' -c constraints.txt`).
      ValueError: no program computes anything, or the path has another ending.
      OSError: the path cannot be written.
    """
    with figure.style():
        made = draw_roofline(estimates, (A100, H100) if accelerators is None else accelerators)
    return figure.save(made, path)


def draw_roofline(
    estimates: Estimate | Mapping[str, Estimate], accelerators: Sequence[Accelerator] = (A100, H100)
) -> Figure:
    """The plot, in the current matplotlib style."""
    named: Mapping[str, Any] = estimates if isinstance(estimates, Mapping) else {"": estimates}
    programs = points(named, accelerators)
    if not programs:
        raise ValueError("roofline: no program computes anything")
    tops = roofs(named, accelerators)
    made = figure.new_figure(5.4, 3.6)
    axes = made.subplots()
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte", ylabel="FLOP/s")
    # A roof bends where its memory and its engine take equally long. x covers bends and programs.
    bends = [max(roof.flops.values()) / roof.bytes_per_second for roof in tops]
    x = np.array([min(*bends, *(p.intensity for p in programs)) / 4,
                  max(*bends, *(p.intensity for p in programs)) * 4])  # fmt: skip
    colors = dict(zip([roof.name for roof in tops], figure.SERIES * len(tops), strict=False))
    for roof in tops:
        for kind, top in roof.flops.items():
            at = np.array([x[0], top / roof.bytes_per_second, x[1]])
            style = "-" if kind == "16 bits" else "--"
            heights = np.minimum(at * roof.bytes_per_second, top)
            axes.plot(at, heights, style, color=colors[roof.name], lw=1.3)
    for point in programs:
        color = colors[point.machine]
        face = color if point.estimated else "none"
        axes.plot(point.intensity, point.flops, "o", ms=6, mec=color, mfc=face, zorder=3)
    _name_programs(axes, programs)
    _name_roofs(axes, tops, colors)
    axes.set_xlim(*x)
    figure.engineering_ticks(axes, "y")
    axes.grid(True)
    axes.plot([], [], "o", color="gray", label="program, estimated")
    axes.plot([], [], "o", color="gray", mfc="none", label="on a chip, at best")
    axes.legend(loc="best", fontsize="small")
    axes.set_title("roofline")
    return made


def roofs(estimates: Mapping[str, Any], accelerators: Sequence[Accelerator]) -> list[Roof]:
    """The roofs of the estimates' wafers and of the accelerators."""
    by_name = {}
    for e in estimates.values():
        pes, machine = e.wafer.size, e.machine
        memory = machine.read_bytes_per_cycle + machine.write_bytes_per_cycle
        flops = {
            kind: 2.0 * machine.fmacs_per_cycle(dtype) * pes * e.clock_hz
            for kind, dtype in (("float32", "float32"), ("16 bits", "float16"))
        }
        by_name[of_wafer(e)] = Roof(of_wafer(e), memory * pes * e.clock_hz, flops)
    for chip in accelerators:
        flops = {"16 bits": chip.bfloat16_flops}
        if chip.float32_flops:
            flops = {"float32": chip.float32_flops, **flops}
        by_name[chip.name] = Roof(chip.name, chip.memory_bytes_per_second, flops)
    return list(by_name.values())


def points(
    estimates: Mapping[str, Any], accelerators: Sequence[Accelerator]
) -> list[RooflinePoint]:
    """The points of programs on their wafers and on chips; none for one that computes nothing."""
    program_points = []
    for name, e in estimates.items():
        if not e.flops or not e.cycles:
            continue
        moved = max(e.port_bytes * e.wafer.size, 1.0)
        program_points.append(
            RooflinePoint(of_wafer(e), name, e.flops / moved, e.flops_per_second, True)
        )
        for chip in accelerators:
            seconds = e.accelerators.get(chip.name)
            if seconds:
                intensity = e.flops / max(chip.memory_traffic(e.host_bytes, e.launches), 1.0)
                program_points.append(
                    RooflinePoint(chip.name, name, intensity, e.flops / seconds, False)
                )
    return program_points


def _name_programs(axes: Axes, programs: Sequence[RooflinePoint]) -> None:
    """Writes each program's name below its lowest point on wafers, and on chips."""
    lowest: dict[tuple, RooflinePoint] = {}
    for point in programs:
        key = point.program, point.machine if point.estimated else ""
        if key not in lowest or point.flops < lowest[key].flops:
            lowest[key] = point
    near: dict[tuple[int, int], list[str]] = {}  # names by place, of points that almost touch
    for (program, _), point in sorted(lowest.items(), key=lambda item: item[1].flops):
        place = round(2 * np.log10(point.intensity)), round(2 * np.log10(point.flops))
        near.setdefault(place, []).append(program)
        axes.annotate(
            program, (point.intensity, point.flops), (0, 4 - 10 * len(near[place])),
            textcoords="offset points", ha="center", va="top", fontsize="small",
        )  # fmt: skip


def _name_roofs(axes: Axes, tops: Sequence[Roof], colors: Mapping[str, str]) -> None:
    """Writes the roofs' names to their right, at least the height of a line apart."""
    named = sorted((top, roof.name, kind) for roof in tops for kind, top in roof.flops.items())
    least, most = np.log10(axes.get_ylim())
    line, at = (most - least) / 17, -np.inf
    for top, name, kind in named:
        at = max(np.log10(top), at + line)
        axes.annotate(
            f"{name.removesuffix(' PEs')}, {kind}", (1.0, 10**at), (5, 0), annotation_clip=False,
            xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            color=colors[name], fontsize="small",
        )  # fmt: skip
