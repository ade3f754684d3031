"""The map of a wafer in a terminal: each character cell is two dots, as two half blocks.

A dot is a PE, or a block of PEs on a large wafer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console
from rich.style import Style
from rich.text import Text

from wsekern.estimator.pictures import quantities
from wsekern.estimator.pictures.wafer_map import Zoom, check_defects

# matplotlib's viridis at equal steps (N. Smith and S. van der Walt, 2015); a terminal map must do
# without matplotlib.
_HEAT = np.array([
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137),
    (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
], float)  # fmt: skip
_DEFECT = (224, 33, 138)
_SHADES = " .:-=+*#%@"  # for a console without colors
_MAX_ROWS = 48  # dots; two rows of dots are a line of text
_MAX_COLUMNS = 76


def terminal_map(
    what: Any,
    quantity: str = "load",
    *,
    defects: ArrayLike | None = None,
    zoom: Zoom | None = None,
    label: str = "",
    console: Console | None = None,
) -> None:
    """Prints a heat map of a quantity by PE; it needs no matplotlib.

    A dot stands for one PE or a block of PEs and shows their largest value. It is a defect if half
    of its PEs or more are. In a console without colors, denser characters are larger values.

    Args:
      what: a `wk.Estimate`, or values by PE, `[height, width]`.
      quantity: for an estimate. "load": words on each PE's busiest outgoing link. "N", "E", "S" or
        "W": words on its link in that direction. "busy": cycles for which its engine or busiest
        link is busy. "sram": bytes of data at most.
      defects: True where a PE does not work, `[height, width]`. For an estimate with a placement,
        of the whole wafer, since its PEs are drawn at their physical places.
      zoom: draw only the rows y0 to y1 and columns x0 to x1, as (y0, y1, x0, x1); y1 and x1 are
        left out.
      label: the title of an array's values, with their unit.
      console: the rich console to print on; by default standard output.

    Raises:
      ValueError: the shapes of values and defects differ, the zoom is outside of the map, or there
        is no such quantity.
    """
    shown = quantities.on_wafer(what, quantities.quantity_of(what, quantity, label))
    zoom = zoom or quantities.extent(what)
    faulty = check_defects(shown.values, defects, zoom)
    console = console or Console()
    height, width = shown.values.shape
    y0, y1, x0, x1 = zoom or (0, height, 0, width)
    values, faulty = shown.values[y0:y1, x0:x1], faulty[y0:y1, x0:x1]
    dots, broken = _dots(values, faulty, min(_MAX_COLUMNS, console.width - 2))
    finite = values[np.isfinite(values)]
    least = min(0.0, float(finite.min(initial=0.0)))
    most = max(float(finite.max(initial=0.0)), least) if shown.top is None else shown.top
    share = np.clip((dots - least) / ((most - least) or 1.0), 0.0, 1.0)
    console.print(Text(f"{shown.title}, rows {y0} to {y1 - 1}, columns {x0} to {x1 - 1}"))
    if shown.note:
        console.print(Text(shown.note))
    colored = console.color_system is not None
    render = _color_line if colored else _text_line
    for top in range(0, len(dots), 2):
        console.print(render(share[top : top + 2], broken[top : top + 2]), soft_wrap=True)
    console.print(_legend(least, most, shown.unit, bool(faulty.any()), colored), soft_wrap=True)


def _dots(values: np.ndarray, faulty: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Each block's largest value, and whether it is a defect; a small grid is enlarged."""
    height, width = values.shape
    block = max(-(-width // columns), -(-height // _MAX_ROWS))
    larger = max(1, min(columns // width, _MAX_ROWS // height, 2))
    rows, cols = np.arange(0, height, block), np.arange(0, width, block)

    def each(function: np.ufunc, array: np.ndarray) -> np.ndarray:
        return function.reduceat(function.reduceat(array, rows, 0), cols, 1)

    counted = each(np.add, np.ones(values.shape))
    broken = each(np.add, faulty.astype(float)) * 2 >= counted
    dots = each(np.fmax, values)
    return tuple(np.kron(a, np.ones((larger, larger), a.dtype)) for a in (dots, broken))  # type: ignore[return-value]


def _color_line(share: np.ndarray, broken: np.ndarray) -> Text:
    line = Text()
    for x in range(share.shape[1]):
        halves = [_style_color(share[y, x], broken[y, x]) for y in range(len(share))]
        line.append("▀", Style(color=halves[0], bgcolor=halves[1] if len(halves) > 1 else None))
    return line


def _text_line(share: np.ndarray, broken: np.ndarray) -> Text:
    most, fault = np.fmax.reduce(share, 0), np.logical_or.reduce(broken, 0)
    return Text("".join("x" if f else _shade(s) for s, f in zip(most, fault, strict=True)))


def _shade(share: float) -> str:
    return " " if np.isnan(share) else _SHADES[round(share * (len(_SHADES) - 1))]


def _style_color(share: float, broken: bool) -> str:
    if np.isnan(share):
        return "rgb(128,128,128)"
    steps = np.arange(len(_HEAT)) / (len(_HEAT) - 1)
    heat = [np.interp(share, steps, _HEAT[:, c]) for c in range(3)]
    return "rgb({:.0f},{:.0f},{:.0f})".format(*(_DEFECT if broken else heat))


def _legend(least: float, most: float, unit: str, faulty: bool, colored: bool) -> Text:
    line = Text(f"{_number(least)} ")
    for share in np.linspace(0, 1, 24):
        if colored:
            line.append("█", Style(color=_style_color(share, False)))
        else:
            line.append(_shade(share))
    line.append(f" {_number(most)} {unit}".rstrip())
    if faulty:
        line.append("  █" if colored else "  x", Style(color=_style_color(0, True)))
        line.append(" defect")
    return line


def _number(value: float) -> str:
    """The value with all digits before the point: 1,120,000, and 0.25."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
