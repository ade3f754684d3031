"""The heat example, run as a user runs it, and small."""

import numpy as np
import pytest


def test_it_keeps_its_heat_and_draws(example_called, run, tmp_path, capsys):
    picture = tmp_path / "heat.png"
    run(example_called("heat"), "--wafer", "2x2", "--cells", 24, "--steps", 30, "--out", picture)
    output = capsys.readouterr().out
    assert abs(float(output.split("holds ")[1].split()[0])) < 1e-6
    assert picture.stat().st_size > 10_000


def test_equal_steps_have_titles_that_are_equally_far_apart(example_called, monkeypatch):
    heat = example_called("heat")
    drawn = []
    monkeypatch.setattr(heat, "picture", lambda path, panels, **options: drawn.extend(panels))
    plate = np.zeros((256, 256), np.float32)
    heat.draw(plate, [plate] * 3, 500, "heat.png")
    assert [panel.title for panel in drawn] == [
        "step 0: 0 ms",
        "step 500: 139 ms",
        "step 1,000: 277 ms",
        "step 1,500: 416 ms",
    ]


def test_it_says_what_a_wafer_would_take(example_called, run, capsys):
    run(example_called("heat"), "--estimate", "8x8", "--cells", 64, "--steps", 10)
    output = capsys.readouterr().out
    assert "cycles" in output and "heat.py" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "0 must be 1 or more"),
        (["--wafer", "two"], "'two' is not a grid"),
        (["--wafer", "1x2", "--virtual", "1x2"], "not allowed with"),
        (["--out", "nowhere/heat.png"], "there is no folder"),
        (["--out", "heat.xls"], "must end in .png or .svg or .pdf"),
    ],
)
def test_refuses(example_called, run, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(example_called("heat"), *arguments)
    assert message in capsys.readouterr().err + str(end.value)
