"""The configuration: refusals, files, the command line, and what a resumed run may change."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from training import config
from training.config import TrainingConfig, parse

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wafer": "0x4"}, "wafer='0x4' has a side of 0"),
        ({"steps": 0}, "steps=0 does not fit; it must be 1 or more"),
        ({"batch": -1}, "batch=-1 does not fit"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 does not fit; it must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan does not fit"),
        ({"clip_norm": float("inf")}, "clip_norm=inf does not fit"),
        ({"min_learning_rate": 0.1}, "min_learning_rate=0.1 is above learning_rate=0.001"),
        ({"beta2": 1.0}, "beta2=1.0 does not fit; it must be from 0 to below 1"),
        ({"validation_fraction": 0.0}, "between 0 and 1"),
        ({"decay_fraction": 1.5}, "above 0 and at most 1"),
        ({"batch": 12, "microbatch": 5}, "not a multiple of microbatch=5; use batch=10 or 15"),
        ({"wafer": "2x1x1", "batch": 7}, "batch=7 is not a multiple of the 2 wafers.*use 6 or 8"),
        ({"wafer": "4x1x1", "batch": 8, "microbatch": 2}, "microbatch=2 is not .* use 4"),
        ({"steps": 2.5}, "steps=2.5 is not of type int"),
        ({"steps": True}, "steps=True is not of type int"),
        (
            {"data": 5},
            r"data=5 is not of type Sequence\[str\]; give a path, or a sequence of paths",
        ),
        ({"data": (5,)}, r"data=\(5,\) is not of type Sequence\[str\]"),
        ({"tokens": "words"}, r"tokens=.words. is not of type .*Literal\[.bytes., .characters."),
        ({"microbatch": "all"}, "microbatch='all' is not of type int | None"),
        ({"preset": ""}, "preset is empty"),
        ({"data": ""}, "data='' is empty; name a file or a folder, or leave it out"),
        ({"data": ("a.txt", "")}, "data='' is empty"),
        ({"init": ""}, "init='' is empty"),
    ],
)
def test_refuses_by_field_value_and_mend(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**fields)


TEXT = pathlib.Path("text.txt")


@pytest.mark.parametrize("data", ["text.txt", ("text.txt",), ["text.txt"], TEXT, [TEXT]])
def test_a_single_source_is_data_as_the_flag_takes_it(data):
    run = TrainingConfig(data=data)
    assert run == parse(["--data", "text.txt"]) and run.data == ("text.txt",)
    assert dataclasses.replace(run, data="other.txt").data == ("other.txt",)


def test_derived_sizes():
    run = TrainingConfig(wafer="2x3x4", batch=12, microbatch=4, learning_rate=0.5)
    assert (run.grid, run.pes, run.passes) == ((2, 3, 4), 24, 3)
    assert run.final_learning_rate == 0.05
    assert run.run_dir == pathlib.Path("runs/nano")
    assert dataclasses.replace(run, out="here", microbatch=None).run_dir == pathlib.Path("here")


def test_a_saved_configuration_is_loaded_as_it_was(tmp_path):
    run = TrainingConfig(steps=7, data=("/a", "/b"), microbatch=None, platform="cpu", resume=True)
    config.save_config(run, tmp_path / "config.json")
    assert config.load_config(tmp_path / "config.json") == dataclasses.replace(run, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_data_is_saved_as_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config.save_config(TrainingConfig(data=("texts/*.txt",)), "config.json")
    assert config.load_config("config.json").data == (str(tmp_path / "texts/*.txt"),)


def test_fields_that_are_none_get_values():
    resolved = config.resolve_config(TrainingConfig(learning_rate=1e-2), context=64)
    assert (resolved.context, resolved.microbatch, resolved.out) == (64, 12, "runs/nano")
    assert resolved.min_learning_rate == pytest.approx(1e-3)
    assert config.resolve_config(resolved, context=128) == resolved


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"stesp": 3}', "'stesp' is not a name of a choice; did you mean 'steps'"),
        ('{"steps": "3"}', "steps='3' is not of type int"),
        ('{"data": 5}', "data=5 is not of type Sequence"),
        ('{"steps": true}', "steps=True is not of type int"),
        ('{"steps": 1e400}', "steps=inf is not of type int"),
        ('{"steps": 1' + "0" * 400 + "}", "steps=10.* does not fit; it must be 1 or more"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "learning_rate=10.* does not fit"),
        ('{"learning_rate": NaN}', "learning_rate=nan does not fit"),
        ('{"clip_norm": Infinity}', "clip_norm=inf does not fit"),
        ('{"preset": ["nano"]}', "preset=.'nano'. is not of type str"),
        ('{"steps": 3, "steps": 4}', "'steps' stands in it twice"),
        ("[" * 2000, "more than 64 others"),
        ("[3]", "is not a JSON object, it is .3."),
        ("{", "config.json is not valid JSON"),
        ("", "config.json is not valid JSON"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load_config(path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"steps": 5, "seed": 3, "data": ["x"]}))
    run = parse(["--config", str(path), "--seed", "0", "--data", "a", "b"])
    assert (run.steps, run.seed, run.batch, run.data) == (5, 0, 12, ("a", "b"))


def test_a_resumed_run_starts_from_what_its_folder_saved(tmp_path):
    config.save_config(TrainingConfig(steps=5, batch=6, out="elsewhere"), tmp_path / "config.json")
    run = parse(["--resume", "--out", str(tmp_path), "--steps", "9"])
    assert (run.steps, run.batch, run.run_dir, run.resume) == (9, 6, tmp_path, True)
    assert parse(["--out", str(tmp_path)]).batch == 12


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--presett", "nano"], "--preset STR"),
        (["--steps", "many"], "--steps"),
        (["--wafer", "2by4"], "wafer='2by4' is not a grid"),
        (["--platform", "abacus"], "'--platform'"),
        (["--config", "missing.json"], "missing.json' is not a file"),
    ],
)
def test_a_bad_command_line_is_named_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_differences_are_named_field_by_field():
    saved = TrainingConfig(seed=1, steps=10, resume=False)
    now = TrainingConfig(seed=2, steps=20, resume=True)
    assert config.config_differences(saved, now) == [
        "steps: 10 was saved, 20 is given",
        "seed: 1 was saved, 2 is given",
    ]


def test_a_resumed_run_may_change_where_it_runs_but_not_what_it_learns():
    saved = TrainingConfig()
    moved = TrainingConfig(wafer="1x1", steps=400, out="there", log_every=1)
    assert len(config.check_resume(saved, moved)) == 4
    with pytest.raises(ValueError, match="batch: 12 was.*seed: 0 was.*--out") as error:
        config.check_resume(saved, TrainingConfig(wafer="1x1", batch=24, seed=1))
    assert "wafer" not in str(error.value)


def test_every_field_that_may_change_exists():
    names = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert names >= config.MAY_CHANGE


def test_the_command_line_needs_no_jax():
    script = "import sys, training.config; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_shakespeare_example_has_the_published_setting():
    run = parse(["--config", str(ROOT / "examples/shakespeare.json"), "--data", "text"])
    assert (run.tokens, run.context, run.batch, run.steps) == ("characters", 64, 12, 2000)
    assert (run.learning_rate, run.final_learning_rate) == (1e-3, 1e-4)
    assert (run.warmup, run.beta2) == (100, 0.99)
