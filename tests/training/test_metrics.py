"""metrics.jsonl and the loss curve."""

import importlib.util
import json

import jax.numpy as jnp
import numpy as np
import pytest

from training.metrics import MetricsLog, loss_curve, read_metrics


def write(log, step, **others):
    log.write(step, loss=10.0 / step, tokens_per_s=100.0, seconds=0.5 * step, **others)


@pytest.fixture
def run(tmp_path):
    """A run folder with lines for the steps 1 to 5."""
    log = MetricsLog(tmp_path / "run")
    for step in range(1, 6):
        write(log, step, **({"val_loss": 3.0} if step == 4 else {}))
    return tmp_path / "run"


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path)
    write(log, 1)
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 10.0, "tokens_per_s": 100.0, "seconds": 0.5}
    ]
    write(log, 2, val_loss=4.0)
    assert read_metrics(tmp_path / "metrics.jsonl")[1]["val_loss"] == 4.0


def test_every_line_is_json_whatever_the_numbers(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(
        3,
        loss=jnp.float32(jnp.nan),
        tokens_per_s=float("inf"),
        seconds=1.5,
        note="text",
        norm=np.float32(0.5),
        count=np.int32(2),
        other=jnp.int32(4),
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    [text] = (tmp_path / "metrics.jsonl").read_text().splitlines()
    wanted = {"step": 3, "loss": None, "tokens_per_s": None, "seconds": 1.5, "note": "text"}
    wanted |= {"norm": 0.5, "count": 2, "other": 4}
    assert json.loads(text, parse_constant=refuse) == wanted
    assert '"count": 2,' in text and '"other": 4}' in text


def test_a_resumed_run_drops_the_lines_that_it_writes_again(run):
    log = MetricsLog(run, resume_from=3)
    write(log, 4)
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert "val_loss" not in lines[3]
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_the_file_anew(run):
    log = MetricsLog(run)
    write(log, 1)
    assert len(read_metrics(run)) == 1


def test_a_line_cut_short_is_left_out(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert len(read_metrics(run)) == 5
    log = MetricsLog(run, resume_from=6)
    write(log, 7)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"step": true}', '{"step": 6, "val_loss": "x"}', '{"loss": 1.0}']
)
def test_lines_that_are_none_of_ours_are_left_out(run, line):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_refuses_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a run folder or its metrics.jsonl"):
        read_metrics(tmp_path)


def test_the_loss_curve_is_a_picture_of_both_losses(run, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figures = []
    savefig = Figure.savefig

    def record_and_save(figure, *arguments, **options):
        figures.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record_and_save)
    picture = tmp_path / "loss.png"
    assert loss_curve(read_metrics(run), picture) == f"loss curve: {picture}"
    [axes] = figures[0].axes
    train, validation = axes.lines
    assert train.get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert train.get_ydata().tolist() == [10 / step for step in range(1, 6)]
    assert validation.get_xydata().tolist() == [[4, 3.0]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss, nats a token")
    assert imread(picture).shape == (675, 1200, 4)


def test_without_matplotlib_or_losses_there_is_a_note_and_no_picture(run, tmp_path, monkeypatch):
    assert "no loss has been measured" in loss_curve(
        [{"step": 1, "loss": None}], tmp_path / "a.png"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "matplotlib is not installed" in loss_curve(read_metrics(run), tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
