"""A matplotlib figure that a notebook shows by itself.

IPython knows how to show a `Figure` only after `%matplotlib inline` or an import of pyplot, and
these pictures do without pyplot. A class with `_repr_png_` is shown in any case; where the inline
backend is active, its own rule for figures comes first, so that nothing is shown twice.
"""

from __future__ import annotations

import io

from matplotlib.figure import Figure

_DPI = 100  # a figure is 5 to 7 inches wide: it fits a notebook's column


class NotebookFigure(Figure):
    """A figure that needs no magic line to be shown."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=_DPI)
        return data.getvalue()
