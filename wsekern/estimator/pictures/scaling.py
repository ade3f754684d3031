"""The scaling plot: a quantity against PEs or wafers, predicted and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator.pictures import figure, output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Sequence[tuple[float, float]]

_MARKED = 40  # points of a line that are marked; more would run into one another
_ROOM = 0.13  # the share of an axis that a label of six digits takes


def scaling(
    lines: Mapping[str, Series],
    *,
    measured: Mapping[str, Series] | None = None,
    of: str = "PEs",
    quantity: str = "",
    ideal: bool = False,
    path: output.Path | None = None,
) -> Figure:
    """A quantity against a number of PEs or wafers, on logarithmic axes, as a matplotlib figure.

    A notebook shows the figure by itself.

    Args:
      lines: the (number, value) pairs of each line, by its name.
      measured: pairs that are drawn as points, by name; a line of the same name has their color.
      of: what the numbers along x count.
      quantity: what the values are, with their unit.
      ideal: whether to draw ideal scaling too: from the first point of each line, twice the number
        has twice the value.
      path: where to write it (.png, .svg or .pdf); None: nowhere.

    Raises:
      ImportError: matplotlib is not installed (`pip install -e '.[viz]' -c constraints.txt`).
      ValueError: there is no value, or one that is not positive, or the path has another ending.
      OSError: the path cannot be written.
    """
    with figure.style():
        made = draw_scaling(lines, measured or {}, of, quantity, ideal)
    return figure.save(made, path)


def draw_scaling(
    lines: Mapping[str, Series],
    measured: Mapping[str, Series],
    of: str = "PEs",
    quantity: str = "",
    ideal: bool = False,
) -> Figure:
    """The plot, in the current matplotlib style; arguments as of `scaling`."""
    everything = [xy for series in (*lines.values(), *measured.values()) for xy in series]
    if not everything or min(map(min, everything)) <= 0:
        raise ValueError("scaling: it needs one (number, value) pair or more, all positive")
    made = figure.new_figure(5.0, 3.6)
    axes = made.subplots()
    axes.set(xscale="log", yscale="log", xlabel=of, ylabel=quantity)
    names = list(dict.fromkeys([*lines, *measured]))
    colors = dict(zip(names, figure.SERIES * len(names), strict=False))
    for name, series in lines.items():
        x, y = np.array(sorted(series), float).T
        marker = "o" if len(x) <= _MARKED else ""
        axes.plot(x, y, "-", marker=marker, ms=3.5, color=colors[name], lw=1.5, label=name)
        if ideal:
            axes.plot(x, y[0] * x / x[0], ":", color=colors[name], lw=1.0)
    for name, series in measured.items():
        x, y = np.array(sorted(series), float).T
        label = f"{name}, measured"
        axes.plot(x, y, "o", ms=5, mfc="none", mec=colors[name], mew=1.3, label=label)
    if ideal:
        axes.plot([], [], ":", color="gray", label="ideal")
    _ticks(axes, sorted({x for x, _ in everything}))
    axes.grid(True)
    if ideal or len(names) > 1 or measured:
        axes.legend(fontsize="small")
    if quantity:
        axes.set_title(f"{quantity} against {of}")
    return made


def _ticks(axes: Axes, numbers: list[float]) -> None:
    """Along x a tick at each number that has room for its label; along y round values."""
    from matplotlib.ticker import (
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    shown = labeled_numbers(numbers)
    axes.set_xticks(shown, [f"{n:,.0f}" for n in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    least, most = axes.get_ylim()
    # 1, 2, 5, 10 ... may be only one of the values between 7,000 and 12,000.
    round_values = LogLocator(subs=(1.0, 2.0, 5.0)) if most > 10 * least else MaxNLocator(6)
    axes.yaxis.set_major_locator(round_values)
    figure.engineering_ticks(axes, "y")
    axes.yaxis.set_minor_formatter(NullFormatter())


def labeled_numbers(numbers: Sequence[float]) -> list[float]:
    """Those of the rising `numbers` whose labels do not touch on a logarithmic axis.

    The ends have labels; a number between them has one if its neighbors' are far enough.
    """
    first, last = numbers[0], numbers[-1]
    whole = math.log(last / first) if last > first else 1.0
    shown = [first]
    for n in numbers[1:]:
        from_before, to_end = (math.log(a / b) / whole for a, b in ((n, shown[-1]), (last, n)))
        if from_before >= _ROOM and (to_end >= _ROOM or n == last):
            shown.append(n)
    return shown if shown[-1] == last or len(numbers) == 1 else [*shown, last]
