"""Training from a checkpoint: its sizes, weights and tokenizer, and the model written back."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIGS, make

import models
from models.text.reading import load_tokenizer
from sharding.state import named_leaves
from training.config import TrainingConfig, load_config
from training.trainer import Trainer

tokenizers = pytest.importorskip("tokenizers")

TEXT = "the quick brown fox jumps over the lazy dog and runs away again\n" * 200


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny Qwen3 with experts, sizes that no grid divides, and a tokenizer of words."""
    words = sorted(set(TEXT.split()))
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(
            {word: i for i, word in enumerate(["<unk>", "<end>", *words])}, unk_token="<unk>"
        )
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = make(tmp_path / "start", CONFIGS["qwen3-moe"] | {"vocab_size": 61})
    inner.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


@pytest.fixture
def config(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("WSEKERN_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    return TrainingConfig(
        init=str(checkpoint),
        data=(str(data),),
        out=str(tmp_path / "run"),
        wafer="2x2",
        context=16,
        batch=4,
        steps=1,
        eval_batches=1,
        checkpoint_minutes=0,
        prompt="the quick brown",
        sample_tokens=3,
    )


def test_a_checkpoint_is_trained_on_and_written_back(config, checkpoint):
    """The first step's learning rate is 0, so the weights are written back as they were read."""
    trainer = Trainer(config)
    assert trainer.config.tokens == "checkpoint"
    # 12 words, "<unk>", "<end>", and the "<|endoftext|>" that the class of Qwen3's tokenizer has.
    assert trainer.corpus.vocab == 15 and trainer.corpus.validation[-1] == 1  # the end of a text
    result = trainer.fit()
    before = models.load(checkpoint)
    tokens = np.asarray(trainer.corpus.validation[:17], np.int32)[None]
    logits = np.asarray(jax.nn.log_softmax(before(tokens[:, :-1])))
    assert abs(result.loss + np.take_along_axis(logits, tokens[:, 1:, None], 2).mean()) < 0.5
    assert result.sample is not None and result.sample.startswith("the quick brown ")
    after = models.load(config.run_dir / "model")
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(a, b)
    assert load_tokenizer(config.run_dir / "model").ends == (1,)

    saved = load_config(config.run_dir / "config.json")
    longer = Trainer(dataclasses.replace(saved, resume=True, steps=3)).fit()
    assert longer.step == 3 and longer.loss < result.loss + 0.5
    trained = models.load(config.run_dir / "model")
    old, new = (named_leaves(nnx.state(model))["embedding"][...] for model in (before, trained))
    assert not np.array_equal(old, new)


def test_the_run_is_named_for_its_checkpoint_and_takes_at_most_1024_tokens(config):
    run = dataclasses.replace(config, out=None, context=None)
    assert run.run_dir.parts == ("runs", "start")
    assert Trainer(dataclasses.replace(config, context=None)).config.context == 64


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"init": "/nowhere"}, FileNotFoundError, "/nowhere: no such folder"),
        ({"context": 65}, ValueError, "context=65 is longer than that of checkpoint '.*start'"),
        ({"tokens": "bytes"}, ValueError, "has 256 different tokens, checkpoint .* knows 61"),
    ],
)
def test_refuses_before_any_work(config, changes, error, message):
    with pytest.raises(error, match=message):
        Trainer(dataclasses.replace(config, **changes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": "checkpoint"}, "tokens='checkpoint' with init=None: name the checkpoint"),
        ({"tokens": "characters", "init": "a"}, "tokens='characters' with init='a': it knows its"),
    ],
)
def test_tokens_and_checkpoint_must_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**fields)
