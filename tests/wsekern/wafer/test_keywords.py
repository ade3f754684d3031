"""A keyword by this library's name or by JAX's."""

import inspect
from typing import Any

import pytest

from wsekern.wafer.keywords import Requirement, accept_jax_names

POSITIVE = Requirement(lambda value: value > 0, "above 0")


@accept_jax_names("scale", {"tolerance": POSITIVE}, tol="tolerance")
def scale(x, *, tolerance: float = 0.5, tol: float | None = None):
    """`x * tolerance`."""
    return x * tolerance


def test_either_name_serves():
    assert scale(2) == 1
    assert scale(2, tolerance=3) == scale(2, tol=3) == scale(x=2, tolerance=3, tol=3) == 6
    assert scale(2, tolerance=3, tol=None) == 6


@pytest.mark.parametrize("tolerance", [0.5, 3])
def test_two_values_are_refused_a_default_that_is_given_too(tolerance):
    message = f"scale: tolerance={tolerance} and tol=4 name one keyword twice; give one"
    with pytest.raises(ValueError, match=message):
        scale(2, tolerance=tolerance, tol=4)


@pytest.mark.parametrize("name", ["tolerance", "tol"])
def test_a_value_is_checked_under_the_name_that_was_typed(name):
    options: dict[str, Any] = {name: -1}
    with pytest.raises(ValueError, match=f"^scale: {name}=-1 must be above 0$"):
        scale(2, **options)
    options[name] = None  # not given
    assert scale(2, **options) == 1


def test_help_shows_both_names_and_the_default():
    assert str(inspect.signature(scale)).startswith("(x, *, tolerance: float = 0.5, tol: float |")
    assert scale.__doc__ == "`x * tolerance`."
