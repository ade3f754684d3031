"""The plot of predictions against published measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from wsekern.estimator.pictures import figure, output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wsekern.estimator.validation.points import PredictedPoint, Validation

_BAND = 10  # percent of error; predictions within it lie in a shaded band


def plot_published(validation: Validation, path: output.Path | None = None) -> Figure:
    """Each prediction against its measurement, and its error; hollow points were fitted on.

    Args:
      validation: from `wsekern.estimator.validation.points.validate`.
      path: where to write it (.png, .svg or .pdf); None: nowhere.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: no point was predicted, or the path has another ending.
      OSError: the path cannot be written.
    """
    if not validation.rows:
        raise ValueError("no point of the table was predicted, so that there is nothing to plot")
    with figure.style():
        made = figure.new_figure(8.4, max(3.4, 0.9 + 0.2 * len(validation.rows)))
        left, right = made.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.15]})
        families = list(dict.fromkeys(row.point.family for row in validation.rows))
        colors = dict(zip(families, figure.SERIES * len(families), strict=False))
        _scatter(left, validation.rows, colors)
        _errors(right, validation.rows, colors)
    return figure.save(made, path)


def _scatter(axes: Axes, rows: list[PredictedPoint], colors: dict[str, str]) -> None:
    values = [v for row in rows for v in (row.point.value, row.predicted)]
    ends = np.array([min(values) / 2, max(values) * 2])
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.fill_between(ends, ends * (1 - _BAND / 100), ends * (1 + _BAND / 100),
                      color="gray", alpha=0.25, lw=0)  # fmt: skip
    axes.plot(ends, ends, color="gray", lw=0.8)
    for family, color in colors.items():
        family_rows = [row for row in rows if row.point.family == family]
        for fitted in (False, True):
            some = [row for row in family_rows if row.fitted == fitted]
            axes.plot(
                [row.point.value for row in some], [row.predicted for row in some], "o", ms=6,
                mec=color, mfc="none" if fitted else color, mew=1.3,
            )  # fmt: skip
        units = ", ".join(dict.fromkeys(row.point.unit for row in family_rows))
        # An empty series for the legend: the points above are drawn in two lots.
        axes.plot([], [], "o", color=color, label=f"{family or 'other'}, {units}")
    axes.plot([], [], "o", mec="gray", mfc="none", mew=1.3, label="fitted")
    axes.set(xlabel="measured", ylabel="predicted", title="predicted against published")
    axes.set_aspect("equal")
    axes.legend(fontsize="small")


def _errors(axes: Axes, rows: list[PredictedPoint], colors: dict[str, str]) -> None:
    axes.axvspan(-_BAND, _BAND, color="gray", alpha=0.25, lw=0)
    axes.axvline(0, color="gray", lw=0.8)
    for y, row in enumerate(rows):
        color, error = colors[row.point.family], 100 * row.error
        axes.plot([0, error], [y, y], "-", color=color, lw=1.3)
        axes.plot(error, y, "o", ms=6, mec=color, mfc="none" if row.fitted else color, mew=1.3)
    widest = max([1.2 * _BAND, *(110 * abs(row.error) for row in rows)])
    axes.set(xlim=(-widest, widest), ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), [row.point.id for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(xlabel="error of the prediction, %", title=f"error by point; shaded: {_BAND} %")
