"""The style that all pictures share, and how they become files or parts of a page.

matplotlib is loaded when a picture is drawn, and without pyplot: no window opens, and no state is
shared with the user's own figures.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import pathlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wsekern.estimator.pictures import output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Near the colors of M. Okabe and K. Ito, which color-blind readers tell apart; shifted a little so
# that they show on white and on black.
SERIES = ("#1A80C4", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C8C8C")
LANES = dict(zip(("compute", "N", "E", "S", "W", "wafer", "loop"), SERIES, strict=True))
HEAT = "viridis"  # equal steps look equal, also in gray and to color-blind readers
DEFECT = "#E0218A"
_INK, _FAINT = "#1c2126", "#8c9096"
# Stands for the text color of a page, which changes with the reader's dark mode. No picture uses
# this color otherwise, so that `inline_svg` can replace it.
_PAGE_INK = "#010203"
_DPI = 200


def check_installed() -> None:
    """Returns if pictures can be drawn, that is if matplotlib is installed.

    Raises:
      ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "pictures need matplotlib, which is not installed; in the checkout, run "
            "`pip install -e '.[viz]' -c constraints.txt`"
        )


@contextlib.contextmanager
def style(of_page: bool = False) -> Iterator[None]:
    """A context in which pictures are made in the common style.

    Args:
      of_page: whether the picture is for a page: transparent, with larger text in a color that
        `inline_svg` makes that of the page.
    """
    check_installed()
    import matplotlib

    ink = _PAGE_INK if of_page else _INK
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    look: dict[Any, Any] = {
        "font.size": 10.5 if of_page else 9.0,
        "axes.titlesize": "medium",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.frameon": False,
        "grid.color": _FAINT,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.5,
        "svg.fonttype": "none",  # text stays text, in the page's font
        "svg.hashsalt": "wsekern",  # the same picture has the same ids each time
        "image.composite_image": False,
    }
    look |= dict.fromkeys(inked, ink) | dict.fromkeys(clear, "none" if of_page else "white")
    with matplotlib.rc_context(look):
        yield


def new_figure(width: float, height: float, laid_out: bool = True) -> Figure:
    """An empty figure of `width x height` inches, which a notebook shows without a magic line.

    Args:
      width: in inches.
      height: in inches.
      laid_out: whether matplotlib places the axes; else the caller does.
    """
    from wsekern.estimator.pictures.notebook import NotebookFigure

    return NotebookFigure(
        figsize=(width, height), layout="constrained" if laid_out else None, dpi=_DPI
    )


def save(figure: Figure, path: output.Path | None) -> Figure:
    """`figure`, after writing it to `path` if that is not None.

    Raises:
      ValueError: the path does not end in .png, .svg or .pdf.
      OSError: it cannot be written.
    """
    if path is not None:
        output.check_writable(path, SUFFIXES)
        data = io.BytesIO()
        suffix = pathlib.Path(path).suffix.lower().removeprefix(".")
        with style():
            figure.savefig(data, format=suffix, dpi=_DPI)
        output.write(path, data.getvalue())
    return figure


def inline_svg(figure: Figure, description: str) -> str:
    """An SVG element for a page; it loads nothing and takes the color of the page's text.

    Args:
      figure: made in `style(of_page=True)`.
      description: what the picture shows, for readers who cannot see it.
    """
    text = io.StringIO()
    with style(of_page=True):
        figure.savefig(text, format="svg", dpi=_DPI, transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[a-zA-Z0-9_.]+">', "<g>", svg)  # ids must be unique in a page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = svg.replace(_PAGE_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


def engineering_ticks(axis: Axes, which: str, unit: str = "") -> None:
    """Ticks of the axis `which` ("x" or "y") as 0.2, 200k or 3M; with a unit as 1.5 ms."""
    from matplotlib.ticker import EngFormatter

    formatter = EngFormatter(unit=unit, sep=" " if unit else "")
    # A count or a share is not said in thousandths: 0.2, and not 200m.
    write = formatter if unit else lambda n, at=None: f"{n:g}" if abs(n) < 1 else formatter(n, at)
    getattr(axis, f"{which}axis").set_major_formatter(write)
