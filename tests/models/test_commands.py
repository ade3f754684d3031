"""The commands of `python -m models`: generate, info, convert."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_checkpoints import CONFIGS, make

import models
from models.__main__ import main
from models.arguments import GenerateCommand

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama that reads bytes."""
    return make(
        tmp_path_factory.mktemp("models") / "llama", CONFIGS["llama3"] | {"vocab_size": 256}
    )


@pytest.fixture(autouse=True)
def compiled_programs_go_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_generate_writes_the_text_and_nothing_else_to_standard_output(folder, capsys):
    command = ["generate", "--model", str(folder), "--max-new-tokens", "9", "--prompt"]
    assert main([*command, "The wafer"]) == 0
    alone = capsys.readouterr()
    tokens = np.frombuffer(b"The wafer", np.uint8).astype(np.int32)[None]
    new = models.generate(models.load(folder), tokens, max_new_tokens=9)[0, 9:]
    assert alone.out == bytes(np.asarray(new, np.uint8)).decode(errors="replace") + "\n"
    assert "parameters" in alone.err and "9 in all" in alone.err
    assert main([*command, "The wafer", "and the fabric", "--wafer", "2x2", "--logprobs"]) == 0
    both = capsys.readouterr()
    assert both.out.startswith(alone.out) and both.out.count("\n") >= 3
    assert len([line for line in both.err.splitlines() if "\t" in line]) == 9


def test_info_describes_checkpoints_and_presets_without_reading_weights(folder, capsys):
    assert main(["info", "--model", str(folder)]) == 0
    shown = capsys.readouterr().out
    count = sum(leaf.size for leaf in jax.tree.leaves(state(folder)))
    assert f"{count:,}" in shown and "llama" in shown
    assert main(["info", "--model", "gpt-oss-120b"]) == 0
    assert "116,829,156,672" in capsys.readouterr().out


def test_convert_writes_a_folder_that_loads_the_same(folder, tmp_path, capsys):
    out = tmp_path / "converted"
    assert main(["convert", "--model", str(folder), "--out", str(out), "--dtype", "bfloat16"]) == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    for a, b in zip(jax.tree.leaves(state(folder)), jax.tree.leaves(state(out)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-8)
    assert main(["convert", "--model", str(folder), "--out", str(out)]) == 2
    assert "holds something already" in capsys.readouterr().err
    file = out / "config.json"
    for place in (file, file / "deeper"):
        assert main(["convert", "--model", str(folder), "--out", str(place)]) == 2
        assert f"'{file}' is no folder" in capsys.readouterr().err


def state(folder):
    from flax import nnx

    return nnx.state(models.load(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "/nowhere", "--prompt", "a"], "/nowhere: no such folder"),
        (["generate", "--model", "{}", "--prompt", ""], "prompt='' has no tokens"),
        (["generate", "--model", "{}", "--prompt", "a", "--chat"], "has no chat template"),
        (
            ["generate", "--model", "{}", "--prompt", "a" * 65],
            "65 tokens and max_new_tokens=1 are",
        ),
        (
            ["generate", "--model", "{}", "--prompt", "a", "--top-p", "2", "--max-new-tokens", "1"],
            "top_p=2.0 must be above 0 and at most 1",
        ),
        (["info", "--model", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_an_error_is_one_line(folder, arguments, message, capsys):
    assert main([argument.format(folder) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err.splitlines()[-1] and not printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "a", "--prompt", "a", "--wafer", "0x4"], "has a side of 0"),
        (["generate", "--model", "a", "--prompt", "a", "--system", "b"], "add --chat"),
        (["generate", "--model", "a", "--prompt", "a", "--chat-options", '{"a": 1}'], "add --chat"),
        (["generate", "--model", "a", "--prompt", "a", "--chat-options", "{"], "is not valid JSON"),
        (
            ["generate", "--model", "a", "--prompt", "a", "--chat-options", "[]"],
            "not a JSON object",
        ),
        (
            ["generate", "--model", "a", "--prompt", "a", "--chat"]
            + ["--chat-options", '{"messages": []}'],
            "chat_options has 'messages'",
        ),
        (["generate", "--prompt", "a"], "--model"),
        (["speak"], "speak"),
    ],
)
def test_a_wrong_flag_ends_with_status_2_before_jax_is_imported(arguments, message):
    program = "import sys; from models.__main__ import main\ntry:\n  main(sys.argv[1:])\n"
    program += "finally:\n  assert 'jax' not in sys.modules"
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("seed", [-1, -(2**63) - 1, 2**32, 10**20 - 1])
def test_a_seed_that_does_not_fit_is_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed} does not fit; it must be from 0 to"):
        GenerateCommand(model="a", prompt=("a",), seed=seed)


def test_a_model_that_is_a_link_to_nothing_is_named(tmp_path, capsys):
    (tmp_path / "link").symlink_to("gone")
    assert main(["info", "--model", str(tmp_path / "link")]) == 2
    assert f"{tmp_path / 'link'} is a link to 'gone', which is not there" in capsys.readouterr().err
