import re

import pytest

from models.__main__ import main
from models.arguments import PlanCommand


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "v5e:2x2", "--mode", "train"], "python -m training --compile-only"),
        (["--target", "v5:2x2"], "topology 'v5:2x2' is not known"),
    ],
)
def test_a_plan_for_chips_that_cannot_be_served_is_refused(words, message, capsys):
    assert main(["plan", "nano", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layouts": ("2x2",)}, "layouts and largest_batch are of a compilation; give --target"),
        ({"largest_batch": True}, "layouts and largest_batch are of a compilation"),
        ({"target": "v5e:2x2", "batch": 0}, "batch=0 must be 1 or more"),
        ({"target": "v5e:2x2", "layouts": ("two",)}, "'two' is not a grid"),
    ],
)
def test_arguments_that_do_not_belong_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PlanCommand(model="nano", **fields)


@pytest.mark.tpu
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_the_programs_of_generation_are_compiled(mode, tmp_path, capsys):
    page = tmp_path / "plan.html"
    words = ["--target", "v5e:2x2", "--mode", mode, "--batch", "2", "--html", str(page)]
    assert main(["plan", "nano", *words, "--context", "64"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"program +nano: 2 sequences, .*64 tokens, bfloat16", printed)
    assert "it fits" in printed and page.stat().st_size > 2000
