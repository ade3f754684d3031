"""Flags and the config file: each key is a flag, a flag wins, and what is wrong is named."""

import pathlib
import re
import subprocess
import sys

import pytest

from serving.arguments import ModelCommand, ModelOptions, parse

TWO = """
port = 8080
max-streams = 4
requests_minute = 5
origins = "https://a.example"
drain-seconds = 3
[[models]]
model = "a"
name = "first"
[[models]]
model = "b.gguf"
weights = "stored"
max_streams = 2
load = "asked"
"""


@pytest.fixture
def config(tmp_path):
    """Writes a config file; returns its flags."""

    def write(text):
        (tmp_path / "serving.toml").write_text(text)
        return ["--config", str(tmp_path / "serving.toml")]

    return write


def refusal(capsys, argv):
    with pytest.raises(SystemExit) as end:
        parse(argv)
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_one_model_needs_no_more_than_its_folder():
    assert parse(["--model", "x"]).models == (ModelCommand(model="x"),)


def test_several_models_have_their_names_in_order():
    command = parse(["--model", "x", "--name", "one", "--model=y", "--name", "two", "--chunk=64"])
    options = ModelOptions(chunk=64)
    assert command.models == (
        ModelCommand(model="x", name="one", options=options),
        ModelCommand(model="y", name="two", options=options),
    )


def test_the_file_on_the_page_is_one(config):
    page = pathlib.Path(__file__).parents[2] / "docs" / "serving.md"
    (block,) = re.findall(r"^```toml\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    command = parse(config(block))
    assert [model.options.load for model in command.models] == ["start", "asked"]
    assert (command.max_loaded, command.http.limits.requests_minute) == (1, 60)


def test_a_table_says_for_one_model_what_the_top_says_for_all(config):
    command = parse(config(TWO))
    assert (command.port, command.http.drain_seconds) == (8080, 3.0)
    assert command.http.limits.requests_minute == 5
    assert command.http.origins == {"https://a.example"}
    assert command.models == (
        ModelCommand(model="a", name="first", options=ModelOptions(max_streams=4)),
        ModelCommand(
            model="b.gguf",
            options=ModelOptions(weights="stored", max_streams=2, load="asked"),
        ),
    )


def test_what_the_top_says_of_models_is_completed_by_their_tables(config):
    text = 'activations = "int8"\n[[models]]\nmodel = "a"\nweights = "int8"'
    (model,) = parse(config(text)).models
    assert (model.options.weights, model.options.activations) == ("int8", "int8")


def test_a_flag_wins_over_the_file(config):
    flags = [*config(TWO), "--port", "1", "--max_streams=9", "--no-lookup", "--host", "127.0.0.1"]
    command = parse(flags)
    assert command.port == 1 and command.http.drain_seconds == 3.0
    assert [one.options.max_streams for one in command.models] == [9, 9]
    assert not any(one.options.lookup for one in command.models)
    (model,) = parse([*flags, "--model", "c"]).models
    assert model == ModelCommand(model="c", options=ModelOptions(max_streams=9, lookup=False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "serving.toml: prot = 1: no such key; did you mean port?"),
        ("zzz = true", "zzz = true: no such key; known are model, name"),
        ('port = "a"', "port = 'a': write a whole number"),
        ("port = true", "port = true: write a whole number"),
        ("port = 70000", "serving.toml: port=70000 must be from 0 to 65535"),
        ('platform = "cups"', 'platform = \'cups\': write "cpu" or "gpu" or "tpu"'),
        ("origins = [1]", "origins = [1]: write a text in quotes, or a list of them"),
        ("drain-seconds = inf", "drain_seconds=inf must be 0 or more"),
        ("port = 1\nport = 2", "serving.toml: it is not TOML"),
        ("max-loaded = 1\nmax_loaded = 2", "max_loaded is there twice, also as max_loaded"),
        ('config = "x"', "no such key"),
        ('keys = ["secret"]', "no such key"),
        ("x = " + "[" * 5000, "serving.toml: it is"),
        ("", "no model; give --model"),
        ("models = 3", "begin each with [[models]]"),
        ('model = "a"\n[[models]]\nmodel = "b"', "stand beside [[models]]"),
        ('[[models]]\nname = "a"', "[[models]] number 1 has no model"),
        ('[[models]]\nmodel = "a"\nchunk = 0', "[[models]] number 1: chunk=0 must be 1 or more"),
        ('[[models]]\nmodel = "a"\nport = 1', "[[models]] number 1: port = 1: no such key"),
        ('[[models]]\nmodel = "a"\nwieghts = "int8"', "did you mean weights?"),
        (
            'max_loaded = 1\nmodel = ["a", "b"]',
            "2 models are to be loaded at the start, max_loaded=1",
        ),
    ],
)
def test_refuses_a_file(text, message, config, capsys):
    said = refusal(capsys, config(text))
    assert message in said, said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no model; give --model FOLDER_OR_GGUF"),
        (["--model", "a", "--model", "b", "--name", "c"], "there are 2 of --model and 1 of --name"),
        (["--model", "a", "--max-loaded", "0"], "max_loaded=0 must be 1 or more"),
        (["--model", "a", "--idle-minutes", "0"], "idle_minutes=0.0 must be above 0"),
        (["--model", "a", "--prompt-cache-mb", "0"], "prompt_cache_mb=0 must be 1 or more"),
        (["--model", "a", "--requests-minute", "0"], "requests_minute=0 must be at least 1"),
        (["--model", "a", "--most-body", "0"], "most_body=0 must be 1 or more"),
        (["--model", "a", "--ping", "0"], "ping=0.0 must be above 0 seconds"),
        (["--model", "a", "--activations", "int8"], "activations='int8' needs weights='int8'"),
        (["--config", "/nowhere.toml"], "/nowhere.toml: No such file or directory"),
        (["--max-stream", "3"], "--max-streams"),
    ],
)
def test_refuses_flags(flags, message, capsys):
    said = refusal(capsys, flags)
    assert message in said, said


def test_names_from_the_command_line_do_not_fit_models_of_a_file(config, capsys):
    assert "names its models" in refusal(capsys, [*config(TWO), "--name", "x"])


def test_help_needs_no_jax():
    program = "import sys, serving.arguments; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
