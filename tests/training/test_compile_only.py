import re

import pytest

from training.__main__ import main
from training.config import TrainingConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compile_only": True}, "compile_only needs chips to compile for; give --target v5e:4x4"),
        ({"target": "v5e:4x4"}, "target is of a compilation; add --compile-only"),
        ({"layouts": ["2x2"]}, "layouts is of a compilation"),
        ({"largest_batch": True}, "largest_batch is of a compilation"),
        ({"compile_only": True, "target": "v5e:2x2", "virtual": True}, "virtual: chips"),
        ({"compile_only": True, "target": "v5e:2x2", "layouts": ["2by2"]}, "'2by2' is not a grid"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainingConfig(**fields)


def test_a_compilation_is_of_the_call_and_not_of_the_run(tmp_path):
    from training.config import load_config, save_config

    config = TrainingConfig(compile_only=True, target="v5e:2x2", layouts=("1x4",))
    save_config(config, tmp_path / "config.json")
    saved = load_config(tmp_path / "config.json")
    assert (saved.compile_only, saved.target, saved.layouts) == (False, None, ())


@pytest.mark.tpu
def test_a_step_is_compiled_for_the_grid_of_its_chips(tmp_path, capsys):
    page = tmp_path / "step.html"
    words = ["--compile-only", "--target", "v5e:2x2", "--batch", "4", "--html", str(page)]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "step of nano, batch 4 x 64 tokens, float32" in printed and "2x2 of TPU v5e" in printed
    assert "it fits" in printed and "layers.py" in printed
    assert "step of nano" in page.read_text()


@pytest.mark.tpu
@pytest.mark.slow
def test_layouts_stand_in_one_table_and_the_fastest_below(capsys):
    assert main(["--compile-only", "--target", "v5e:2x2", "--layouts", "2x2", "2x1x2"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^2x2 +yes", printed, re.M) and re.search(r"^2x1x2 +yes", printed, re.M)
    assert "the fastest of those that fit" in printed


@pytest.mark.tpu
def test_a_grid_that_the_chips_do_not_make_is_named(capsys):
    assert main(["--compile-only", "--target", "v5e:2x2", "--wafer", "3x3"]) == 2
    assert "3x3 is 9 PEs, and v5e:2x2 has 4 devices" in capsys.readouterr().err
