"""Finite differences: the weights of their formulas, and the longest stable time steps.

Weights are the derivatives of the polynomial through the points, as tabulated in B. Fornberg,
"Generation of Finite Difference Formulas on Arbitrarily Spaced Grids", 1988; limits are those of R.
Courant, K. Friedrichs and H. Lewy, 1928, by the largest eigenvalue of the discrete operator.
"""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction


def difference_coefficients(
    derivative: int, order: int, *, at: float = 0.0
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Offsets and weights of the smallest formula for a derivative, at unit spacing.

    `sum(weight * u[i + offset]) / spacing**derivative` is the derivative of `u` to `order` in the
    spacing. Weights are exact rationals, rounded once.

    Args:
      derivative: which one, 1 or more.
      order: of accuracy, even.
      at: where the derivative is taken, in cells from `i`: 0 for a centered formula, 0.5 for
        halfway to the next cell, as staggered grids need it.

    Raises:
      ValueError: `derivative` is below 1, `order` is odd or below 2, or `at` is neither 0 nor 0.5.
    """
    if derivative < 1:
        raise ValueError(f"difference_coefficients: derivative={derivative} must be 1 or more")
    if order < 2 or order % 2:
        raise ValueError(f"difference_coefficients: order={order} must be even, 2 or more")
    if at not in (0.0, 0.5):
        raise ValueError(f"difference_coefficients: at={at} is neither 0 nor 0.5")
    # Symmetry gives one order more where the formula has as many points as it can use.
    if at == 0:
        half = (derivative + 1) // 2 + order // 2 - 1
        offsets = tuple(range(-half, half + 1))
    else:
        half = derivative // 2 + order // 2
        offsets = tuple(range(1 - half, half + 1))
    places = [offset - Fraction(at) for offset in offsets]
    return offsets, tuple(float(_weight(places, i, derivative)) for i in range(len(places)))


def wave_limit(speed: float, spacing: float | Sequence[float], order: int = 2) -> float:
    """The longest stable time step of leapfrog for the wave equation.

    Args:
      speed: the largest in the field, in units of `spacing` per unit of the result.
      spacing: of the cells: a number for each dimension, or one number for one dimension.
      order: of the second derivatives in space.
    """
    return 2 / (speed * math.sqrt(_largest(spacing, order)))


def diffusion_limit(diffusivity: float, spacing: float | Sequence[float], order: int = 2) -> float:
    """The longest stable time step of explicit Euler for the heat equation.

    Args:
      diffusivity: the largest in the field, in units of `spacing` squared per unit of the result.
      spacing: of the cells: a number for each dimension, or one number for one dimension.
      order: of the second derivatives in space.
    """
    return 2 / (diffusivity * _largest(spacing, order))


def check_time_step(step: float, limit: float) -> None:
    """Warns, and says the limit, if a time step is longer than it.

    Args:
      step: the time step, in the unit of `limit`.
      limit: the longest stable time step, such as `wave_limit` or `diffusion_limit` gives.

    Warns:
      RuntimeWarning: `step` is above `limit`, so that the field grows without bound.
    """
    if step > limit:
        warnings.warn(
            f"the time step {step:.6g} is above the stability limit {limit:.6g}: the field will "
            "grow without bound; take a shorter step or wider cells",
            RuntimeWarning,
            stacklevel=2,
        )


def _largest(spacing: float | Sequence[float], order: int) -> float:
    """The largest eigenvalue of minus the Laplacian."""
    # Its field alternates in sign from cell to cell, so every weight counts with one sign.
    offsets, weights = difference_coefficients(2, order)
    alternating = -sum(w * (-1) ** o for o, w in zip(offsets, weights, strict=True))
    spacings = [spacing] if isinstance(spacing, int | float) else spacing
    return alternating * sum(1 / h**2 for h in spacings)


def _weight(places: Sequence[Fraction], i: int, derivative: int) -> Fraction:
    """The derivative at 0 of the polynomial that is 1 at `places[i]` and 0 at the others."""
    powers = [Fraction(1)]
    for j, place in enumerate(places):
        if j != i:
            # Lagrange's basis: times (x - place) / (places[i] - place), as coefficients of powers.
            raised, kept = [Fraction(0), *powers], [*powers, Fraction(0)]
            gap = places[i] - place
            powers = [(a - place * b) / gap for a, b in zip(raised, kept, strict=True)]
    return powers[derivative] * math.factorial(derivative)
