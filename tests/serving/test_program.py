"""The command: it loads, serves, drains and ends; what cannot be served is refused first."""

import json
import signal
import subprocess
import sys
import urllib.request

import jax
import pytest
from flax import nnx

import models
from models.config import DecoderConfig
from serving.__main__ import main

CONFIG = DecoderConfig(
    vocab=256, d_model=32, d_ff=64, layers=1, heads=2, kv_heads=1, context=64, tied=True
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    models.save(jax.jit(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(0)))(), folder)
    return folder


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_is_served_on_bytes_until_sigterm(folder, tmp_path):
    command = [sys.executable, "-m", "serving", "--model", str(folder), "--port", "0"]
    command += ["--max-streams", "2", "--platform", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            ready = next(line for line in lines if line.startswith("ready: tiny at "))
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "temperature": 0}
            request = urllib.request.Request(
                f"{ready.split()[-1]}/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request) as response:
                answer = json.load(response)
            assert answer["usage"]["completion_tokens"] == 4
            assert answer["choices"][0]["finish_reason"] == "length"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/nowhere"], "/nowhere: no such folder or file"),
        (["--model", "{folder}", "--api-key-file", "{empty}"], "has no key; write one a line"),
    ],
)
def test_refuses(flags, message, folder, tmp_path, capsys):
    (tmp_path / "empty").write_text("# none yet\n")
    places = {"folder": folder, "empty": tmp_path / "empty"}
    assert main([flag.format(**places) for flag in flags]) == 2
    assert message in capsys.readouterr().err
