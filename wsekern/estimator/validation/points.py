"""The estimator against published measurements: measured, predicted, and the error."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from wsekern.estimator.cost import DEFAULT, Constants
from wsekern.estimator.validation.programs import PublishedPoint, PublishedProgram, program_of

POINTS = pathlib.Path(__file__).parent / "points.csv"
# The constants are fitted on these points, one for each constant, so that they come out exactly.
FITTED = ("prefill-8b-480", "prefill-8b-720", "gemm-fp32-128x8", "wave25-nz100", "wave25-nz700")
# The mean error counts these kinds of programs, where they are published whole and with their grid.
COUNTED = ("decode", "prefill", "product", "mesh product", "vector product", "stencil")
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
    note: str = ""  # what the table does not say, and was chosen

    @property
    def is_counted(self) -> bool:
        """Whether the mean error counts it: neither fitted nor merely reported."""
        return not self.fitted and self.point.family in COUNTED and self.point.states_grid

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
        """The points that the mean error counts."""
        return [r for r in self.rows if r.is_counted]

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
                "counted": r.is_counted,
                "note": r.note,
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
      ValueError: a column is missing.
    """
    points, skipped = _read_table(path)
    rows = []
    fitted_on = [p for p in read_points(POINTS) if p.id in FITTED]
    for point in points:
        try:
            program = program_of(point)
            predicted = program.predict(constants)
        except ValueError as error:
            skipped[point.id] = str(error)
            continue
        # A user's table may repeat a point under its id, or use the id for a point of its own.
        fitted = any((point.id, point.value) == (p.id, p.value) for p in fitted_on)
        rows.append(PredictedPoint(point, predicted, fitted, program.note))
    return Validation(rows, skipped)


def cross_validate() -> dict[str, float]:
    """The mean absolute error of each kind of program, with constants fitted without that kind."""
    points = [p for p in read_points(POINTS) if p.family in COUNTED and p.states_grid]
    programs = [program_of(p) for p in points]
    errors = {}
    for family in dict.fromkeys(p.family for p in points):
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
    """The points of a table; rows that are none are left out.

    Raises:
      ValueError: a column is missing.
    """
    return _read_table(path)[0]


def _read_table(path: pathlib.Path | str) -> tuple[list[PublishedPoint], dict[str, str]]:
    """The points of a table, and by their ids the reasons for which other rows are none."""
    path = pathlib.Path(path)
    wanted = [field.name for field in dataclasses.fields(PublishedPoint)]
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in wanted if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: there is no column {missing[0]!r}; it needs {wanted}")
        rows = list(reader)
    points, skipped = [], {}
    for number, row in enumerate(rows, 2):
        fields = {name: (row[name] or "").strip() for name in wanted}
        fields["id"] = fields["id"] or f"line {number}"
        try:
            value = _positive("value", fields["value"])
            clock = _positive("clock_ghz", fields["clock_ghz"] or "0.85")
        except ValueError as error:
            skipped[fields["id"]] = str(error)
            continue
        points.append(PublishedPoint(**fields | {"value": value, "clock_ghz": clock}))  # type: ignore[arg-type]
    return points, skipped


def _positive(column: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan  # such as "137548 against 382"
    if not 0 < number < math.inf:
        raise ValueError(f"{column} {text!r} is not a positive number")
    return number


def _table(v: Validation) -> str:
    lines = [f"{'point':<20} {'measured':>12} {'predicted':>12} {'error':>7}  {'unit':<9} source"]
    for r in v.rows:
        note = " (fitted)" if r.fitted else "" if r.is_counted else " (reported only)"
        note = f" ({r.note}; reported only)" if r.note else note
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
