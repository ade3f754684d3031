"""The map of a wafer: a color for each PE, north at the top."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from wsekern.estimator.pictures import figure, quantities
from wsekern.estimator.pictures.output import Path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Zoom = tuple[int, int, int, int]
_BORDERS = 40  # PEs a side; up to this size of a map, each PE has a border


def wafer_map(
    what: Any,
    quantity: str = "load",
    *,
    defects: ArrayLike | None = None,
    zoom: Zoom | None = None,
    label: str = "",
    path: Path | None = None,
) -> Figure:
    """A heat map of a quantity by PE, as a matplotlib figure, which a notebook shows by itself.

    Args:
      what: a `wk.Estimate`, or values by PE, `[height, width]`, blank where they are not finite.
      quantity: for an estimate. "load": words on each PE's busiest outgoing link. "N", "E", "S" or
        "W": words on its link in that direction. "busy": cycles for which its engine or busiest
        link is busy. "sram": bytes of data at most. Links differ from PE to PE; the rest is the
        same on each, since all run the same program.
      defects: True where a PE does not work, `[height, width]`. For an estimate with a placement,
        of the whole wafer, since its PEs are drawn at their physical places.
      zoom: draw only the rows y0 to y1 and columns x0 to x1, as (y0, y1, x0, x1); y1 and x1 are
        left out.
      label: the title of an array's values, with their unit.
      path: where to write it (.png, .svg or .pdf); None: nowhere.

    Raises:
      ImportError: matplotlib is not installed (`pip install -e '.[viz]' -c constraints.txt`).
      ValueError: the shapes of values and defects differ, the zoom is outside of the map, there is
        no such quantity, or the path has another ending.
      OSError: the path cannot be written.
    """
    shown = quantities.on_wafer(what, quantities.quantity_of(what, quantity, label))
    zoom = zoom or quantities.extent(what)
    faulty = check_defects(shown.values, defects, zoom)
    with figure.style():
        made = draw_map(shown, faulty, zoom)
    return figure.save(made, path)


def check_defects(values: np.ndarray, defects: ArrayLike | None, zoom: Zoom | None) -> np.ndarray:
    """The defects as a boolean array, all False for None.

    Raises:
      ValueError: the defects have another shape than the values, or the zoom is outside of them.
    """
    faulty = np.zeros(values.shape, bool) if defects is None else np.asarray(defects, bool)
    if faulty.shape != values.shape:
        raise ValueError(
            f"wafer_map: defects of shape {faulty.shape} are not of the map's, {values.shape}"
        )
    if zoom is not None:
        y0, y1, x0, x1 = zoom
        height, width = values.shape
        if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
            raise ValueError(
                f"wafer_map: zoom={tuple(zoom)} is not (y0, y1, x0, x1) within {height}x{width} PEs"
            )
    return faulty


def draw_map(
    shown: quantities.Quantity, faulty: np.ndarray, zoom: Zoom | None = None, side: float = 6.0
) -> Figure:
    """The map with its color scale, in the current style; `side` is its largest size, in inches."""
    height, width = shown.values.shape
    y0, y1, x0, x1 = zoom or (0, height, 0, width)
    scale = min(side / (x1 - x0), side / (y1 - y0))
    wide, high = max((x1 - x0) * scale, side / 2), max((y1 - y0) * scale, side / 8)
    left, right, below = 0.65, 0.25, 1.05  # inches
    whole = max(left + wide + right, side)
    title = [shown.title, *_wrap(_describe(shown, zoom), whole - left)]
    above = 0.17 * len(title) + 0.16
    tall = above + high + below
    made = figure.new_figure(whole, tall, laid_out=False)
    axes = made.add_axes((left / whole, below / tall, wide / whole, high / tall))
    image = draw_on_axes(axes, shown, faulty, (y0, y1, x0, x1))
    axes.set_title("\n".join(title))
    axes.set_xlabel("x, west to east", loc="left")
    axes.set_ylabel("y, north to south" if high > side / 4 else "y")
    legend = axes.get_legend()
    if legend is not None:  # below the map, beside the label of the x axis
        legend.set_bbox_to_anchor((1.0, -0.2 / high))
    bar = made.colorbar(
        image,
        cax=made.add_axes((left / whole, 0.45 / tall, wide / whole, 0.1 / tall)),
        orientation="horizontal",
    )
    bar.outline.set_visible(False)
    bar.set_label(shown.unit or shown.title)
    bar.ax.locator_params(nbins=6)
    figure.engineering_ticks(bar.ax, "x")
    if not np.any(shown.values[np.isfinite(shown.values)]):
        bar.set_ticks([0])  # the other end of the scale means nothing
    return made


def draw_on_axes(
    axes: Axes, shown: quantities.Quantity, faulty: np.ndarray, zoom: Zoom, top: float | None = None
) -> AxesImage:
    """Draws values and defects on `axes`, whose ticks are the PEs' places on the whole wafer.

    Args:
      axes: where to draw.
      shown: the values.
      faulty: where PEs do not work, of the same shape.
      zoom: the part to draw, as (y0, y1, x0, x1).
      top: the value at which the colors end; None: that of `shown`, or else the largest.
    """
    y0, y1, x0, x1 = zoom
    values, faulty = shown.values[y0:y1, x0:x1], faulty[y0:y1, x0:x1]
    finite = values[np.isfinite(values) & ~faulty]
    least = min(0.0, float(finite.min())) if finite.size else 0.0
    top = shown.top if top is None else top
    most = max(float(finite.max()), least) if top is None and finite.size else top or 0.0
    # A faulty PE is blank on a small map. A large map is scaled down, where a blank would spread to
    # its neighbors; there, the square that `_mark` draws is enough.
    image = axes.imshow(
        np.where(faulty & (np.max(values.shape) <= 4 * _BORDERS), np.nan, values),
        cmap=figure.HEAT,
        vmin=least,
        vmax=most if most > least else least + 1.0,
        extent=(x0 - 0.5, x1 - 0.5, y1 - 0.5, y0 - 0.5),
        interpolation="antialiased",
        aspect="auto",  # the axes have the shape of the grid, unless that is a line
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=2)
    count_ticks(axes, 7)
    if max(values.shape) <= _BORDERS:
        axes.set_xticks(np.arange(x0, x1 + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(y0, y1 + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", alpha=0.35, linewidth=0.5)
        axes.tick_params(which="minor", length=0)
    _mark(axes, faulty, y0, x0)
    return image


def count_ticks(axes: Axes, at_most: int) -> None:
    """Ticks at whole PEs, at most so many on either axis."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(at_most, integer=True, min_n_ticks=1))


def _mark(axes: Axes, faulty: np.ndarray, y0: int, x0: int) -> None:
    """Draws a square for each defect: as large as a PE, or larger if that would not be seen."""
    ys, xs = np.nonzero(faulty)
    if not len(ys):
        return
    points = axes.get_window_extent().width / axes.figure.dpi * 72 / faulty.shape[1]
    side = max(0.8 * points, 1.0)
    axes.scatter(
        xs + x0, ys + y0, s=side * side, marker="s", c=figure.DEFECT, linewidths=0,
        rasterized=len(ys) > 500, label=f"{len(ys):,} defects",
    )  # fmt: skip
    axes.legend(loc="upper right", borderpad=0, handletextpad=0, markerscale=6 / side)


def _wrap(text: str, inches: float) -> list[str]:
    """`text` in lines of at most so many inches, in the current style."""
    import matplotlib

    # A character is half as wide as the type is large, on average; a line of capitals a bit wider.
    characters = inches * 72 / (0.54 * matplotlib.rcParams["font.size"])
    return textwrap.wrap(text, max(20, int(characters)))


def _describe(shown: quantities.Quantity, zoom: Zoom | None) -> str:
    """The second line of the title: which PEs are drawn, and the note."""
    height, width = shown.values.shape
    part = f"{height} x {width} PEs"
    if zoom is not None:
        y0, y1, x0, x1 = zoom
        part = f"rows {y0} to {y1 - 1}, columns {x0} to {x1 - 1}"
    return f"{part}; {shown.note}" if shown.note else part
