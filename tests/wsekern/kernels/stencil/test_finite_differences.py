"""Coefficients of difference quotients, and the largest stable time steps."""

import math
import warnings

import numpy as np
import pytest

from wsekern.kernels.stencil import finite_differences


@pytest.mark.parametrize("at", [0.0, 0.5])
@pytest.mark.parametrize("order", [2, 4, 8])
@pytest.mark.parametrize("derivative", [1, 2, 3])
def test_exact_for_polynomials_up_to_the_order(derivative, order, at):
    offsets, weights = finite_differences.difference_coefficients(derivative, order, at=at)
    for power in range(derivative + order):
        got = math.fsum(w * (o - at) ** power for o, w in zip(offsets, weights, strict=True))
        want = math.factorial(derivative) if power == derivative else 0
        assert got == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("order", [2, 4, 8])
def test_the_error_falls_as_claimed(order):
    offsets, weights = finite_differences.difference_coefficients(2, order)

    def error(h):
        sines = [w * math.sin(1 + o * h) for o, w in zip(offsets, weights, strict=True)]
        return abs(math.fsum(sines) / h**2 + math.sin(1))

    ratio = error(0.4) / error(0.2)
    assert math.log2(ratio) == pytest.approx(order, abs=0.25)


def test_known_weights():
    assert finite_differences.difference_coefficients(2, 2) == ((-1, 0, 1), (1.0, -2.0, 1.0))
    assert finite_differences.difference_coefficients(1, 2, at=0.5) == ((0, 1), (-1.0, 1.0))
    _, eighth = finite_differences.difference_coefficients(2, 8)
    np.testing.assert_allclose(eighth[4:], [-205 / 72, 8 / 5, -1 / 5, 8 / 315, -1 / 560])


def test_limits_are_those_of_the_textbook():
    assert finite_differences.wave_limit(2.0, (1.0, 1.0)) == pytest.approx(1 / (2 * math.sqrt(2)))
    assert finite_differences.diffusion_limit(2.0, 0.5) == pytest.approx(0.5**2 / (2 * 2.0))
    with pytest.warns(RuntimeWarning, match="0.3 is above the stability limit 0.25"):
        finite_differences.check_time_step(0.3, finite_differences.diffusion_limit(1.0, (1.0, 1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finite_differences.check_time_step(0.25, 0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 2), "derivative=0 must be 1"), ((2, 3), "order=3 must be even"), ((1, 2, 0.3), "at=0.3")],
)
def test_refuses(arguments, message):
    *two, at = (*arguments, 0.0)[:3]
    with pytest.raises(ValueError, match=message):
        finite_differences.difference_coefficients(*two, at=at)
