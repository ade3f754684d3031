"""What the pictures of examples share: colors that one cell cannot take, and bars that say so."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def pictures(example_called):
    return example_called("pictures")


def test_a_few_loud_cells_do_not_set_the_colors(pictures):
    field = np.linspace(-1, 1, 1001)
    field[500:505] = 1e6
    low, high = pictures.both_ways(field, 0.99)
    assert low == -high and 0.9 < high < 1
    assert pictures.both_ways(field) == (-1e6, 1e6)
    assert pictures.both_ways(np.zeros(3)) == (-1, 1)


@pytest.mark.parametrize(
    ("limits", "tips"),
    [
        (None, "neither"),
        ((-1, 1), "both"),
        ((-9, 1), "max"),
        ((-1, 9), "min"),
        ((-9, 9), "neither"),
    ],
)
def test_a_color_bar_has_a_tip_where_values_lie_beyond_it(pictures, limits, tips, monkeypatch):
    drawn = []
    figure = type("Figure", (), {"colorbar": lambda self, image, **options: drawn.append(options)})
    panel = pictures.Panel(values=np.array([-2.0, 2.0]), extent=(0, 1, 0, 1), limits=limits)
    pictures._color_bar(figure(), None, panel, None)
    assert drawn[0]["extend"] == tips
