"""Presets: published parameter counts, FLOPs, and refusals."""

import dataclasses

import jax
import pytest
from flax import nnx

import models
from models.decoder import Decoder
from models.families.llama import NANO
from models.presets import PRESETS, find_preset


def count(config):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(Decoder.shapes(config))))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # What the hub counts in the published checkpoints.
    [
        ("gpt2-124m", 124_439_808),
        ("8b", 8_030_261_248),
        ("70b", 70_553_706_496),
        ("smollm2-135m", 134_515_008),
        ("llama3.3-70b", 70_553_706_496),
        ("qwen3-235b-a22b", 235_093_634_560),
        ("gpt-oss-120b", 116_829_156_672),
    ],
)
def test_published_parameter_counts(name, parameters):
    assert count(find_preset(name)) == parameters


def test_flops_are_six_a_parameter_and_token_but_for_attention():
    config = dataclasses.replace(NANO, tied=False)
    weights = count(config) - config.vocab * config.d_model  # the lookup multiplies nothing
    norms = (2 * config.layers + 1) * config.d_model
    scores = 3 * 2 * config.layers * config.d_attention * 64
    assert config.flops_per_token(64) == 6 * (weights - norms) + scores


def test_an_unknown_preset_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean 'nano'"):
        find_preset("nanno")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers=0 must be 1 or more"),
        ({"d_model": 130}, "d_model=130 is not a multiple of heads=4"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"d_model": 132}, "d_model=132 / heads=4 is 33: rotary positions need an even head size"),
        ({"positions": "rope"}, "positions='rope' is not one of"),
        ({"norm": "batch"}, "norm='batch' is not one of"),
        ({"head_size": 0}, "head_size=0 must be 1 or more"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NANO, **change)


def test_every_preset_builds_its_shapes():
    for config in PRESETS.values():
        assert count(config) > 0


def test_presets_are_listed_by_name():
    names = models.list_presets()
    assert {"nano", "gpt2-124m", "llama3-8b", "gpt-oss-20b"} < set(names)
    assert all(models.find_preset(name).layers for name in names)
