"""The serving example: a server of its own, an answer that streams, and its speed."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from flax import nnx

import models

ROOT = pathlib.Path(__file__).parents[2]
SMOLLM2 = pathlib.Path(os.environ.get("SMOLLM2_GGUF", "/nowhere"))
FIGURES = r"\d+ tokens; the first after \d+ ms, then [\d.]+ tokens/s"


def run(*flags, **environment):
    command = [sys.executable, "examples/serve.py", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(not SMOLLM2.exists(), reason="SMOLLM2_GGUF names no file")
def test_smollm2_knows_the_capital_of_france():
    ran = run("--model", str(SMOLLM2))
    assert ran.returncode == 0, ran.stderr
    answer, figures = ran.stdout.strip().rsplit("\n", 1)
    assert "Paris" in answer
    assert re.fullmatch(FIGURES, figures), figures


@pytest.mark.slow
def test_a_model_of_ones_own_answers(tmp_path):
    config = models.DecoderConfig(
        vocab=256, d_model=32, d_ff=64, layers=1, heads=2, kv_heads=1, context=128, tied=True
    )
    models.save(jax.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))(), tmp_path / "tiny")
    flags = ["--model", str(tmp_path / "tiny"), "--max-tokens", "8"]
    ran = run("Hi", *flags, XDG_CACHE_HOME=str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    figures = ran.stdout.strip().rsplit("\n", 1)[-1]
    assert re.fullmatch(FIGURES, figures), figures
    assert figures.startswith("8 tokens")


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    ran = run("--model", str(tmp_path / "nothing"))
    assert ran.returncode == 2
    assert "no such folder or file" in ran.stderr
    assert "Traceback" not in ran.stderr
