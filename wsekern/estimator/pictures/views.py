"""The pictures that a page of an estimate has beside the map and the roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator.pictures import figure, quantities, wafer_map
from wsekern.estimator.pictures.timeline import lanes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wsekern.estimator.result import Estimate

_BARS = 12  # operations in the bar chart
_COLUMNS = 480  # of a timeline, as many as a page shows of it


def draw_directions(e: Estimate) -> Figure:
    """Four maps on one color scale: the words on each PE's link to the N, E, S and W."""
    words = e.link_words()
    top = max(float(load.max()) for load in words.values())
    height, width = e.wafer.height, e.wafer.width
    left, wide, between, below = 0.5, 1.95, 0.2, 0.95  # inches
    high = wide * min(max(height / width, 0.25), 2.0)
    whole, tall = left + 2 * wide + 2 * between, below + 2 * high + 0.7
    made = figure.new_figure(whole, tall, laid_out=False)
    no_defects = np.zeros((height, width), bool)
    for place, direction in enumerate("NESW"):
        row, column = divmod(place, 2)
        at = left + column * (wide + between), below + (1 - row) * (high + 0.35)
        axes = made.add_axes((at[0] / whole, at[1] / tall, wide / whole, high / tall))
        shown = quantities.quantity_of(e, direction)
        image = wafer_map.draw_on_axes(axes, shown, no_defects, (0, height, 0, width), top)
        axes.set_title(f"{shown.title}, at most {words[direction].max():,.0f}", fontsize="small")
        wafer_map.count_ticks(axes, 4)
        axes.tick_params(labelleft=column == 0, labelbottom=row == 1)
    bar = made.colorbar(
        image,
        cax=made.add_axes((left / whole, 0.5 / tall, 1 - (left + between) / whole, 0.1 / tall)),
        orientation="horizontal",
    )
    bar.outline.set_visible(False)
    bar.set_label("words")
    bar.ax.locator_params(nbins=6)
    figure.engineering_ticks(bar.ax, "x")
    return made


def draw_lanes(e: Estimate) -> Figure:
    """How busy each lane is over time; a second part shows the start, until a loop is steady."""
    steady = min((v.start for v in e.events if v.lane == "loop"), default=0.0)
    spans = {"one PE, which stands for all": e.cycles}
    if 0 < steady < e.cycles / 2:
        spans["its start, until a loop's trips take equally long"] = steady
    shown = [lane for lane in lanes(e) if lane != "loop"]
    made = figure.new_figure(4.8, (0.9 + 0.3 * len(shown)) * len(spans))
    for axes, (title, end) in zip(
        made.subplots(len(spans), squeeze=False).flat, spans.items(), strict=True
    ):
        _draw_lanes(axes, e, shown, max(end, 1.0))
        axes.set_title(title)
    return made


def _draw_lanes(axes: Axes, e: Estimate, shown: list[str], until: float) -> None:
    edges = np.linspace(0, until, _COLUMNS + 1)
    for y, lane in enumerate(shown):
        busy = busy_shares(e, lane, edges)
        color = figure.LANES[lane]
        axes.axhspan(y - 0.4, y + 0.4, color=color, alpha=0.12, lw=0)
        axes.fill_between(
            edges,
            y + 0.4,
            y + 0.4 - 0.8 * np.append(busy, busy[-1]),
            step="post",
            color=color,
            lw=0,
        )
    titles = [f"{lanes(e)[lane]}, {busy_shares(e, lane, edges[[0, -1]])[0]:.0%}" for lane in shown]
    axes.set_yticks(range(len(shown)), titles)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlim=(0, until), ylim=(len(shown) - 0.4, -0.6), xlabel="cycles")
    figure.engineering_ticks(axes, "x")


def busy_shares(e: Estimate, lane: str, edges: np.ndarray) -> np.ndarray:
    """The share of the time between neighboring `edges` in which a lane is busy."""
    events = [v for v in e.events if v.lane == lane]
    start, end, share = (
        np.array([getattr(v, k) for v in events]) for k in ("start", "end", "share")
    )
    until = np.array([np.sum(share * (np.clip(t, start, end) - start)) for t in edges])
    return np.minimum(np.diff(until) / np.diff(edges), 1.0)


def draw_longest(e: Estimate) -> Figure:
    """The operations that take most cycles."""
    cycles: dict[str, float] = {}
    for name, _, each in e.by_operation:
        cycles[name] = cycles.get(name, 0.0) + each
    least = sum(cycles.values()) / 500  # a shorter bar would not be seen
    shown = [item for item in cycles.items() if item[1] > least]
    most = sorted(shown, key=lambda item: -item[1])[:_BARS]
    made = figure.new_figure(4.8, 0.8 + 0.24 * max(len(most), 1))
    axes = made.subplots()
    axes.barh([name for name, _ in most], [c for _, c in most], color=figure.SERIES[0], height=0.7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("cycles of the program")
    axes.grid(True, axis="x")
    axes.set_axisbelow(True)
    figure.engineering_ticks(axes, "x")
    axes.set_title("cycles by operation")
    return made
