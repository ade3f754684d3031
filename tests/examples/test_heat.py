"""The heat example, run as a user runs it, and small."""

import pytest


def test_it_keeps_its_heat_and_draws(example_called, run, tmp_path, capsys):
    picture = tmp_path / "heat.png"
    run(example_called("heat"), "--wafer", "2x2", "--cells", 24, "--steps", 30, "--out", picture)
    output = capsys.readouterr().out
    assert abs(float(output.split("holds ")[1].split()[0])) < 1e-6
    assert picture.stat().st_size > 10_000


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
    ],
)
def test_refuses(example_called, run, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        run(example_called("heat"), *arguments)
    assert message in capsys.readouterr().err + str(end.value)
