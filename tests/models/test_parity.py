"""Every family against transformers: logits, loss, gradient, greedy text."""

import importlib.util
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

import models
import wsekern as wk
from models.__main__ import main
from models.text.reading import load_tokenizer

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden.json").read_text())
SMOLLM2 = os.environ.get("SMOLLM2_GGUF")  # as `examples/smollm2.py` keeps it
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers"
)


def numbers(model, tokens):
    """Logits, the mean loss of each next token, and the norm of its gradient."""
    graph, params = nnx.split(model)

    def loss(params):
        logits = nnx.merge(graph, params)(tokens)
        return wk.cross_entropy(logits[:, :-1], tokens[:, 1:]).mean(), logits

    (loss_, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    return np.asarray(logits), float(loss_), float(norm)


def check(got, logits, loss, norm):
    np.testing.assert_allclose(got[0], logits, atol=2e-4)
    assert got[1] == pytest.approx(loss, abs=1e-5)
    assert got[2] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_numbers_equal_those_of_transformers(name, tmp_path):
    folder = tiny.make(tmp_path, tiny.CONFIGS[name])
    model, tokens, want = models.load(folder), jnp.asarray(tiny.tokens()), GOLDEN[name]
    got = numbers(model, tokens)
    check((got[0][:, ::8, ::16], *got[1:]), want["logits"], want["loss"], want["gradient_norm"])
    text = models.generate(model, tokens[:, : tiny.PROMPT], max_new_tokens=tiny.NEW)
    # Two tokens within 1e-3 could be taken either way; these texts have none so close.
    np.testing.assert_array_equal(text[:, tiny.PROMPT :], want["text"])


@pytest.mark.parametrize("grid", ["2x4", "virtual-4x4"])
@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen3-moe", "gpt-oss"])
def test_numbers_are_the_same_on_wafers(name, grid, tmp_path, wafer_called):
    folder = tiny.make(tmp_path, tiny.CONFIGS[name])
    tokens, want = jnp.asarray(tiny.tokens()), GOLDEN[name]
    with wafer_called(grid):
        model = models.load(folder)
        got = numbers(model, tokens)
        text = models.generate(model, tokens[:, : tiny.PROMPT], max_new_tokens=5)
    check((got[0][:, ::8, ::16], *got[1:]), want["logits"], want["loss"], want["gradient_norm"])
    np.testing.assert_array_equal(text[:, tiny.PROMPT :], np.array(want["text"])[:, :5])


@needs_transformers
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_transformers_reads_the_same_model_from_what_is_saved(name, tmp_path):
    want = tiny.by_transformers(tiny.make(tmp_path / "theirs", tiny.CONFIGS[name]))
    model = models.load(tmp_path / "theirs")
    check(
        numbers(model, jnp.asarray(tiny.tokens())),
        *(want[key] for key in ("logits", "loss", "gradient_norm")),
    )
    models.save(model, tmp_path / "ours")
    again = tiny.by_transformers(tmp_path / "ours")
    np.testing.assert_array_equal(again["logits"], want["logits"])


@needs_transformers
@pytest.mark.skipif(not SMOLLM2, reason="SMOLLM2_GGUF names no file")
def test_smollm2_equals_transformers(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    out = str(tmp_path / "smollm2")
    assert main(["convert", "--model", str(SMOLLM2), "--out", out, "--dtype", "float32"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").double().eval()
    model, tokenizer = models.load(out), load_tokenizer(pathlib.Path(out))
    tokens = np.array([tokenizer.encode("The capital of France is Paris, which lies on the Seine")])
    ids = torch.tensor(tokens)
    with torch.no_grad():
        want = theirs(ids)
        # Its own loss is a sum over the vocabulary in float32, whatever the model's dtype.
        loss = torch.nn.functional.cross_entropy(want.logits[0, :-1], ids[0, 1:]).item()
        text = theirs.generate(ids, max_new_tokens=16, do_sample=False).numpy()
    logits, got, _ = numbers(model, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, want.logits.numpy(), atol=2e-4)
    assert got == pytest.approx(loss, abs=1e-5)
    likeliest = torch.topk(want.logits, 5).indices.numpy()
    np.testing.assert_array_equal(np.argsort(-logits)[..., :5], likeliest)
    np.testing.assert_array_equal(models.generate(model, tokens, max_new_tokens=16), text)


def test_masks_and_segments_hide_tokens(tmp_path):
    model = models.load(tiny.make(tmp_path, tiny.CONFIGS["llama3"]))
    tokens = jnp.asarray(tiny.tokens(12))
    graph, params = nnx.split(model)
    run = jax.jit(lambda *a, **k: nnx.merge(graph, params)(*a, **k))
    alone = run(tokens[:, 4:])
    present = jnp.arange(12)[None].repeat(2, 0) >= 4
    positions = jnp.arange(12) - 4
    for options in (
        {"mask": present},
        {"mask": present.astype(jnp.int32)},
        {"segment_ids": present.astype(jnp.int32)},
        {"mask": present[:, None] & jnp.ones((2, 12, 1), bool)},
    ):
        got = run(tokens, positions, **options)
        np.testing.assert_allclose(got[:, 4:], alone, atol=1e-5)
        assert jnp.isfinite(got).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": jnp.arange(5)}, r"positions is \(5,\) and tokens \(2, 33\): it must be"),
        ({"mask": jnp.ones((2, 5))}, r"mask is \(2, 5\)"),
        ({"segment_ids": jnp.ones(33, int)}, r"segment_ids is \(33,\)"),
    ],
)
@pytest.mark.refuses
def test_a_call_refuses(options, message, tmp_path):
    model = models.load(tiny.make(tmp_path, tiny.CONFIGS["llama3"]))
    with pytest.raises(ValueError, match=message):
        model(jnp.asarray(tiny.tokens()), **options)
