"""Draw fields as pictures and films, for the scientific examples."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """A field `[rows, columns]` as a picture."""

    values: Any
    extent: tuple[float, float, float, float]  # left, right, bottom, top
    title: str = ""
    x: str = "x (m)"
    y: str = "y (m)"
    colors: str = "viridis"
    unit: str = ""  # label of the color bar
    limits: tuple[float, float] | None = None  # of the colors; None: those of the values
    behind: Any = None  # another field, drawn below in gray
    aspect: str = "equal"  # "auto" if x and y have different units


def picture(path: str, panels: Sequence[Panel], *, columns: int, size: tuple[float, float]) -> None:
    """Draws `panels` in rows of `columns`; panels with equal colors share one color bar."""
    plt = _pyplot()
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    alike = len({(panel.colors, panel.limits, panel.unit) for panel in panels}) == 1
    for place, (axis, panel) in enumerate(zip(axes.flat, panels, strict=True)):
        image = _draw(axis, panel)
        if place % columns and alike:
            axis.set_ylabel("")
        if not alike:
            _color_bar(figure, image, panel, axis)
    if alike:
        _color_bar(figure, image, panels[0], axes, pad=0.01)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def film(path: str, panel: Panel, frames: Any, titles: Sequence[str]) -> None:
    """Writes a film of `frames` drawn as `panel`; the end of `path` chooses the format."""
    plt = _pyplot()
    from matplotlib import animation

    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    image = _draw(axis, panel)
    if panel.unit:
        _color_bar(figure, image, dataclasses.replace(panel, values=frames), axis, shrink=0.8)

    def show(i):
        image.set_data(frames[i])
        axis.set_title(titles[i])

    moving = animation.FuncAnimation(figure, show, frames=len(frames))
    moving.save(path, writer="pillow" if path.endswith(".gif") else "ffmpeg", fps=12, dpi=90)
    plt.close(figure)


def both_ways(values: Any, share: float = 1.0) -> tuple[float, float]:
    """Limits symmetric about zero that `share` of the values lie within.

    With less than all of them, a few cells next to a source do not leave the others without color.
    """
    most = float(np.quantile(np.abs(values), share)) or 1.0
    return -most, most


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["axes.formatter.limits"] = -2, 4  # 1.5 and once 1e-4, not 0.00015 at each tick
    return plt


def _color_bar(figure, image, panel, axes, **options):
    """A color bar, with a tip at each end beyond which there are values."""
    low, high = panel.limits or (-np.inf, np.inf)
    below, above = np.min(panel.values) < low, np.max(panel.values) > high
    tips = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = tips.get((bool(below), bool(above)), "neither")
    figure.colorbar(image, ax=axes, label=panel.unit, extend=extend, **options)


def _draw(axis, panel):
    low, high = panel.limits or (None, None)
    alpha = None
    if panel.behind is not None:
        axis.imshow(panel.behind, cmap="gray", extent=panel.extent, aspect=panel.aspect, alpha=0.6)
        alpha = 0.65
    image = axis.imshow(
        panel.values,
        cmap=panel.colors,
        vmin=low,
        vmax=high,
        extent=panel.extent,
        aspect=panel.aspect,
        origin="lower" if panel.extent[3] > panel.extent[2] else "upper",
        alpha=alpha,
    )
    axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
    return image
