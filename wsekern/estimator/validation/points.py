"""The estimator against published measurements: measured, predicted, and the error."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wsekern.estimator.cost import DEFAULT, Constants
from wsekern.estimator.validation.programs import PublishedPoint, PublishedProgram, program_of

POINTS = pathlib.Path(__file__).parent / "points.csv"
# The constants are fitted on these points, one for each constant, so that they come out exactly.
FITTED = ("prefill-8b-480", "prefill-8b-720", "gemm-fp32-128x8", "wave25-nz100", "wave25-nz700")
# The mean error counts these kinds of programs: published whole, and with their grid.
COUNTED = ("decode", "prefill", "product", "stencil")
# What is known of the constants without a fit; a fit with too few points stays here. The start of a
# vector instruction is from four unrelated sources. The others are from the manual, which leaves
# out what they cost beyond.
_PRIOR = Constants(
    vector_start=27.0,
    product_start=4.0,
    phase_start=100.0,
    paired_float32=1.0,
    accumulate_float32=2.0,
)
_STEPS = 3  # of a fit; predictions are nearly linear in the constants
_NAMES = tuple(field.name for field in dataclasses.fields(Constants))


class PredictedPoint(NamedTuple):
    """One point beside its prediction."""

    point: PublishedPoint
    predicted: float
    fitted: bool  # whether the constants were fitted on it

    @property
    def error(self) -> float:
        """The error of the prediction, as a share of the measured value: 0.05 is 5 % too much."""
        return self.predicted / self.point.value - 1


class Validation(NamedTuple):
    """The predicted points of a table, and why the others are left out; `print` it for a table."""

    rows: list[PredictedPoint]
    skipped: dict[str, str]  # by the point's id, why it has no prediction

    @property
    def counted_rows(self) -> list[PredictedPoint]:
        """The points that the mean error counts: neither fitted nor merely reported."""
        return [r for r in self.rows if not r.fitted and r.point.family in COUNTED]

    def __str__(self) -> str:
        return _table(self)

    def as_json(self) -> str:
        """The points as a JSON list of objects with `id`, `measured`, `predicted`, `error` ..."""
        rows = [
            {
                "id": r.point.id,
                "measured": r.point.value,
                "predicted": r.predicted,
                "error": r.error,
                "unit": r.point.unit,
                "fitted": r.fitted,
                "counted": r in self.counted_rows,
                "source": r.point.source,
            }
            for r in self.rows
        ]
        return json.dumps(rows, indent=2)


def validate(path: pathlib.Path | str = POINTS, constants: Constants = DEFAULT) -> Validation:
    """Predicts every point of a table that has the columns of `points.csv`.

    Args:
      path: the table, as CSV.
      constants: the fitted constants of the model.

    Raises:
      ValueError: a column is missing, or a value or a clock is not positive.
    """
    rows, skipped = [], {}
    fitted_on = [p for p in read_points(POINTS) if p.id in FITTED]
    for point in read_points(path):
        try:
            predicted = program_of(point).predict(constants)
        except ValueError as error:
            skipped[point.id] = str(error)
            continue
        # A user's table may repeat a point under its id, or use the id for a point of its own.
        fitted = any((point.id, point.value) == (p.id, p.value) for p in fitted_on)
        rows.append(PredictedPoint(point, predicted, fitted))
    return Validation(rows, skipped)


def cross_validate() -> dict[str, float]:
    """The mean absolute error of each kind of program, with constants fitted without that kind."""
    points = [p for p in read_points(POINTS) if p.family in COUNTED]
    programs = [program_of(p) for p in points]
    errors = {}
    for family in COUNTED:
        others = [(p, g) for p, g in zip(points, programs, strict=True) if p.family != family]
        constants = fit([p for p, _ in others], [g for _, g in others])
        family_errors = [
            abs(g.predict(constants) / p.value - 1)
            for p, g in zip(points, programs, strict=True)
            if p.family == family
        ]
        errors[family] = float(np.mean(family_errors))
    return errors


def fit(
    points: Sequence[PublishedPoint], programs: Sequence[PublishedProgram], trust: float = 0.02
) -> Constants:
    """The constants whose predictions are nearest to the measurements, by logarithms.

    Args:
      points: the measurements.
      programs: the program of each.
      trust: the weight of a constant's distance from what is known of it without a fit; the error
        of a prediction has the weight 1.
    """
    prior = np.log([getattr(_PRIOR, name) for name in _NAMES])
    measured = np.log([p.value for p in points])

    def residuals(x: Any) -> Any:
        constants = Constants(**dict(zip(_NAMES, np.exp(x).tolist(), strict=True)))
        predicted = np.log([program.predict(constants) for program in programs])
        return np.concatenate([predicted - measured, trust * (x - prior)])

    x = prior
    # Gauss-Newton: each step solves the least-squares problem of the slopes at x.
    for _ in range(_STEPS):
        at = residuals(x)
        step = 1e-3
        slopes = [(residuals(x + step * e) - at) / step for e in np.eye(len(x))]
        change = np.linalg.lstsq(np.stack(slopes, 1), -at, rcond=None)[0]
        x = x + np.clip(change, -0.5, 0.5)
    return Constants(**dict(zip(_NAMES, np.exp(x).tolist(), strict=True)))


def read_points(path: pathlib.Path | str) -> list[PublishedPoint]:
    """The points of a table; rows whose value is not one number are left out.

    Raises:
      ValueError: a column is missing, or a value or a clock is not positive.
    """
    path = pathlib.Path(path)
    wanted = [field.name for field in dataclasses.fields(PublishedPoint)]
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in wanted if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: there is no column {missing[0]!r}; it needs {wanted}")
        rows = list(reader)
    points = []
    for number, row in enumerate(rows, 2):
        try:
            value, clock = float(row["value"]), float(row["clock_ghz"] or 0.85)
        except ValueError:
            continue  # a comparison such as "137548 against 382" is not one number
        if not value > 0 or not clock > 0:
            raise ValueError(f"{path}:{number}: value and clock_ghz must be positive")
        fields = {name: row[name] or "" for name in wanted}
        points.append(PublishedPoint(**fields | {"value": value, "clock_ghz": clock}))  # type: ignore[arg-type]
    return points


def _table(v: Validation) -> str:
    lines = [f"{'point':<20} {'measured':>12} {'predicted':>12} {'error':>7}  {'unit':<9} source"]
    for r in v.rows:
        note = " (fitted)" if r.fitted else "" if r in v.counted_rows else " (reported only)"
        lines.append(
            f"{r.point.id:<20} {r.point.value:>12.6g} {r.predicted:>12.6g} {r.error:>+7.1%}  "
            f"{r.point.unit:<9} {r.point.source}{note}"
        )
    errors = [abs(r.error) for r in v.counted_rows]
    if errors:
        lines.append("")
        lines.append(
            f"mean absolute error of {len(errors)} points: {np.mean(errors):.1%}, "
            f"the largest {max(errors):.1%}"
        )
    lines += [f"left out: {name}: {why}" for name, why in v.skipped.items()]
    return "\n".join(lines)
