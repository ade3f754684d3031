"""The metrics of a run: metrics.jsonl, one JSON object a line, and the loss curve."""

import importlib.util
import json
import math
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from training.run_folder import METRICS
from wsekern.atomic_write import atomic_write

Line = dict[str, Any]


class MetricsLog:
    """Appends to the metrics.jsonl of a run folder; every line is handed to the system at once."""

    def __init__(self, run_dir: str | os.PathLike, resume_from: int = 0) -> None:
        """Opens the file, and drops its lines of steps after `resume_from`.

        Args:
          run_dir: the run folder; made if it is not there.
          resume_from: the step that the run goes on from; 0 empties the file.
        """
        path = pathlib.Path(run_dir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [line for line in _lines(path) if line["step"] <= resume_from]
        with atomic_write(path) as file:
            file.write("".join(map(_text, earlier)).encode())
        self._path = path
        self._cut = False  # the last line may be incomplete

    def write(
        self, step: int, *, loss: float, tokens_per_s: float, seconds: float, **others: Any
    ) -> None:
        """Appends a line; a number that is not finite is written as null.

        Args:
          step: steps taken so far.
          loss: of that step, nats a token.
          tokens_per_s: over all devices, in the last steps, without evaluations.
          seconds: time of training since the run began, without the pauses before resuming.
          others: further figures, such as `val_loss`, nats a token.

        Raises:
          OSError: the line was not written, for example because the disk is full. A later call
            still writes whole lines.
        """
        line = {"step": step, "loss": loss, "tokens_per_s": tokens_per_s, "seconds": seconds}
        begin, self._cut = "\n" if self._cut else "", True
        with self._path.open("a") as file:
            file.write(begin + _text(line | others))
        self._cut = False


def read_metrics(path: str | os.PathLike) -> list[Line]:
    """The lines of a metrics.jsonl, in order; incomplete lines are left out.

    Args:
      path: the file, or the run folder that holds it.

    Raises:
      FileNotFoundError: there is no such file.
    """
    path = pathlib.Path(path)
    path = path / METRICS if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; give a run folder or its {METRICS}")
    return _lines(path)


def loss_curve(metrics: Sequence[Line], path: str | os.PathLike) -> str:
    """Draws the losses over the steps to a PNG; returns a line that says where, or why not.

    Args:
      metrics: as `read_metrics` returns them.
      path: the picture to write.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return (
            "no loss curve: matplotlib is not installed; in the checkout, run "
            "`pip install -e '.[viz]' -c constraints.txt`"
        )
    train = _points(metrics, "loss")
    validation = _points(metrics, "val_loss")
    if not train and not validation:
        return "no loss curve: no loss has been measured yet"
    from matplotlib.figure import Figure  # not pyplot, which opens windows and shares state
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
        except (ValueError, RecursionError):  # the process died in the middle of this line
            continue
        if _is_line(line):
            lines.append(line)
    return lines


def _is_line(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and all(isinstance(line.get(name), int | float | None) for name in ("loss", "val_loss"))
    )


def _text(line: Line) -> str:
    return json.dumps({name: _number(value) for name, value in line.items()}) + "\n"


def _number(value: Any) -> Any:
    # JSON has no NaN, and json no numbers of numpy or jax.
    if value is None or isinstance(value, str | bool):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return float(value) if math.isfinite(value) else None


def _points(metrics: Sequence[Line], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
