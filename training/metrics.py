"""This file is the figures of a run: metrics.jsonl, one JSON object a line, and the loss curve."""

import importlib.util
import json
import math
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from wsekern.atomic_write import atomic_write

FILE_NAME = "metrics.jsonl"

Line = dict[str, Any]


class MetricsLog:
    """Appends to the metrics.jsonl of a run folder; a line is on its way to disk once written."""

    def __init__(self, run_dir: str | os.PathLike, resume_from: int = 0):
        """Makes the file, or keeps it, without the lines of steps after `resume_from`.

        Args:
          run_dir: the run folder, made if need be.
          resume_from: the step that the run goes on from; 0 starts the file anew.
        """
        path = pathlib.Path(run_dir) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if line["step"] <= resume_from]
        with atomic_write(path) as file:
            file.write("".join(map(_text, kept)).encode())
        self._path = path
        self._cut = False  # whether the last line may have been written in part

    def write(
        self, step: int, *, loss: float, tokens_per_s: float, seconds: float, **others: Any
    ) -> None:
        """Appends a line; what is not a finite number is written as null.

        Args:
          step: how many steps are done.
          loss: of that step, nats a token.
          tokens_per_s: over all devices, of the last steps, without evaluations.
          seconds: since the run began, pauses between resumed parts left out.
          others: further figures, such as `val_loss`, nats a token.

        Raises:
          OSError: the disk is full, say; a later call goes on as if nothing had happened.
        """
        line = {"step": step, "loss": loss, "tokens_per_s": tokens_per_s, "seconds": seconds}
        begin, self._cut = "\n" if self._cut else "", True
        with self._path.open("a") as file:
            file.write(begin + _text(line | others))
        self._cut = False


def read_metrics(path: str | os.PathLike) -> list[Line]:
    """The lines of a metrics.jsonl in their order; one that was cut short is left out.

    Args:
      path: the file, or the run folder that holds it.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a run folder or its {FILE_NAME}")
    return _lines(path)


def loss_curve(metrics: Sequence[Line], path: str | os.PathLike) -> str:
    """Draws the losses over the steps to a PNG at `path`; a line that says what came of it.

    Args:
      metrics: as `read_metrics` returns them.
      path: of the picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no loss curve: matplotlib is not installed (pip install matplotlib)"
    train = _points(metrics, "loss")
    validation = _points(metrics, "val_loss")
    if not train and not validation:
        return "no loss curve: no loss has been measured yet"
    from matplotlib.figure import Figure  # not pyplot: no window, no state shared with the user's
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        marker = "." if len(train) < 30 else ""
        label = f"training (last {train[-1][1]:.3f})"
        axes.plot(*zip(*train, strict=True), color="tab:blue", marker=marker, label=label)
    if validation:
        label = f"validation (last {validation[-1][1]:.3f})"
        axes.plot(*zip(*validation, strict=True), color="tab:orange", marker="o", label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return f"loss curve: {path}"


def _lines(path: pathlib.Path) -> list[Line]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the process died while it wrote
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _text(line: Line) -> str:
    return json.dumps({name: _number(value) for name, value in line.items()}) + "\n"


def _number(value: Any) -> Any:
    # JSON has no NaN, and knows no numbers of numpy's or jax's.
    if value is None or isinstance(value, str | bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return float(value) if math.isfinite(value) else None


def _points(metrics: Sequence[Line], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
