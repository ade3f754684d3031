"""config.json: each field's value is checked, and what transformers reads otherwise is followed."""

import json
import re
import time
from typing import Any

import jax
import numpy as np
import pytest
import tiny_checkpoints as tiny
from flax import nnx

import models
from models.checkpoints.json_file import shown
from models.presets import FAMILIES, find_family

LLAMA3, GPT2, MOE = (tiny.CONFIGS[name] for name in ("llama3", "gpt2", "qwen3-moe"))
NONSENSE: tuple[Any, ...] = (True, -1, float("nan"), float("inf"), 10**300, "3", [], {"a": 1})
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
)
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range")


def config_of(fields, **changes):
    fields = fields | changes
    return find_family(fields).from_fields(fields)


def refused(folder, fields):
    """The message with which a checkpoint with this config.json is refused; it must come soon."""
    (folder / "config.json").write_text(json.dumps(fields))
    began = time.process_time()
    with pytest.raises(ValueError) as caught:
        models.read_config(folder)
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert str(folder / "config.json") in message and len(message) < 1000
    return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("llama3"), LLAMA3)


@pytest.mark.parametrize("field", SIZES)
def test_a_size_is_a_whole_number(field, folder):
    for value in (0, 2.5, 64.0, *NONSENSE):
        assert f"{field}={shown(value)}" in refused(folder, LLAMA3 | {field: value})


@pytest.mark.parametrize("field", NUMBERS)
def test_a_number_is_finite_and_above_zero(field, folder):
    for value in (None, -1e-5, 1e300, *((0, 1e-300) if field != NUMBERS[-1] else ()), *NONSENSE):
        assert f"{field}={shown(value)}" in refused(folder, LLAMA3 | {field: value})


def test_a_choice_is_true_or_false(folder):
    for field in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        for value in (None, 0, "true", NONSENSE[-1]):
            assert f"{field}=" in refused(folder, LLAMA3 | {field: value})


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "original_max_position_embeddings"])
def test_a_number_of_the_scaling_is_named_with_its_object(field, folder):
    for value in (0, *NONSENSE):
        scaling = LLAMA3["rope_scaling"] | {field: value}
        message = refused(folder, LLAMA3 | {"rope_scaling": scaling})
        assert f"rope_scaling: {field}={shown(value)}" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_hidden_layers": 10**7},
            "num_hidden_layers=10000000 is not a whole number",
        ),
        ({"num_hidden_layers": 9999}, "num_hidden_layers=9999, but the tensors in .* of 3 layers"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, but the tensors in .* are of 3 layers"),
        ({"vocab_size": 10**9}, r"vocab_size=1000000000, but 'model.embed_tokens.weight' in .*97"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' is not a list"),
        ({"architectures": [3]}, "architecture 3 is not one of"),
        ({"model_type": 3}, "model_type=3 is not a name"),
        ({"model_type": "qwen2"}, "model_type='qwen2', but architectures=.*one is wrong"),
        ({"quantization_config": [1]}, r"quantization_config=\[1\] is not an object"),
        ({"quantization_config": "x"}, "quantization_config='x' is not an object"),
        ({"quantization_config": 0}, "quantization_config=0 is not an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config says .* by None"),
        ({"head_dim": 3}, "head_dim=3, but rotary positions need an even head size"),
        (
            {"head_dim": None, "hidden_size": 36, "num_attention_heads": 4},
            "hidden_size=36 and num_attention_heads=4 make heads of 9",
        ),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\] is not one of"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is not an object"),
        ({"rope_scaling": {"factor": 8.0}}, r"has \['factor'\], but no 'rope_type'"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope type \['yarn'\] is not one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: has no 'factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"has \['full_attention'\], but no 'rope_type'",
        ),
        (
            {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_theta=1.0 must be above 1",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named(fields, message, folder):
    assert re.search(message, refused(folder, LLAMA3 | fields))


@pytest.mark.parametrize("fields", tiny.CONFIGS.values(), ids=tiny.CONFIGS)
def test_a_field_that_must_be_there_is_named_in_every_family(fields):
    needed = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "n_layer"}
    needed |= {"max_position_embeddings", "intermediate_size", "n_embd", "n_head", "n_positions"}
    for name in needed & set(fields):
        left = {key: value for key, value in fields.items() if key != name}
        with pytest.raises(ValueError, match=f"has no .*{name}"):
            find_family(left).from_fields(left)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 10**6}, "num_experts=1000000, but 'model.layers.0.mlp.gate.weight' in"),
        ({"num_experts": 0}, "mlp.down_proj.weight.* are missing"),
        ({"num_experts_per_tok": 9}, "chosen=9 of count=8"),
        ({"mlp_only_layers": [0.5]}, r"mlp_only_layers=\[0.5\] is not a list of layers' numbers"),
        ({"mlp_only_layers": 1}, "mlp_only_layers=1 is not a list"),
        ({"mlp_only_layers": list(range(10**5))}, "is not used by the model|missing"),
        ({"decoder_sparse_step": -1}, "decoder_sparse_step=-1 is not a whole number from 0"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes' is neither true nor false"),
    ],
)
def test_experts_that_do_not_fit_are_named(fields, message, tmp_path):
    folder = tiny.make(tmp_path, MOE)
    (folder / "config.json").write_text(json.dumps(MOE | fields))
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        models.load(folder)
    assert time.process_time() - began < 2


def test_what_transformers_reads_otherwise_is_followed():
    """Each line is a reading of transformers 4 and 5."""
    qwen2, qwen3 = tiny.CONFIGS["qwen2-sliding"], tiny.CONFIGS["qwen3-yarn"]
    assert config_of(qwen2, head_dim=32).d_head == 32
    assert config_of(qwen2, head_dim=None).d_head == 16
    assert config_of(qwen2, use_sliding_window=False).windows == ()
    left = {key: value for key, value in qwen2.items() if key != "sliding_window"}
    assert config_of(left).windows == (None, 4096, 4096)
    sliding = ["full_attention", "sliding_attention", "full_attention"]
    assert config_of(qwen2, layer_types=sliding).windows == (None, 5, None)
    with pytest.raises(ValueError, match="use_sliding_window is off"):
        config_of(qwen2, layer_types=sliding, use_sliding_window=False)
    with pytest.raises(ValueError, match="layer_types has 3 layers, there are 2"):
        config_of(qwen2, layer_types=sliding, num_hidden_layers=2)
    # The older name of the kind, and the later one's precedence.
    scaling = {"type": "linear", "rope_type": "yarn", "factor": 4, "beta_fast": 0}
    assert config_of(qwen3, rope_scaling=scaling).rope_scaling.kind == "yarn"
    assert config_of(qwen3, rope_scaling=scaling).rope_scaling.beta_fast == 32
    assert config_of(LLAMA3, num_key_value_heads=None).kv_heads == 4
    other_names = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "n_positions",
    }
    renamed = {key: value for key, value in GPT2.items() if key not in other_names.values()}
    renamed |= {new: GPT2[old] for new, old in other_names.items()}
    assert config_of(renamed, tie_word_embeddings=True).d_model == 64
    assert config_of({"architectures": None, "model_type": "gpt2"} | renamed).tied


@pytest.mark.parametrize(
    "dense", [{"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 0}, {"num_experts": 0}]
)
def test_a_mixture_without_sparse_layers_is_read_and_saved(dense, tmp_path):
    fields = MOE | {"mlp_only_layers": []} | dense
    model = models.load(tiny.make(tmp_path / "a", fields))
    assert model.config.experts is None
    models.save(model, tmp_path / "b")
    again = models.read_config(tmp_path / "b")
    assert again.kinds == model.config.kinds and again.experts is None
    assert json.loads((tmp_path / "b" / "config.json").read_text())["num_experts"] == 0


def test_a_model_without_its_head_is_of_its_family():
    bare = ("GPT2Model", "LlamaModel", "Qwen2Model", "Qwen3Model", "Qwen3MoeModel", "GptOssModel")
    for name, kind in zip(bare, FAMILIES.values(), strict=True):
        assert find_family({"architectures": [name]}) is kind


def test_a_qwen2_with_heads_of_another_size_is_read_and_saved(tmp_path):
    """transformers asks Qwen2's config for a head_dim, which its class does not name."""
    fields = tiny.CONFIGS["qwen2-sliding"] | {"head_dim": 32}
    model = models.load(tiny.make(tmp_path / "a", fields))
    assert model.stages[0].blocks[0].attention.query.weight.shape[-2:] in ((64, 128), (128, 64))
    models.save(model, tmp_path / "b")
    again = models.load(tmp_path / "b")
    for a, b in zip(*(jax.tree.leaves(nnx.state(m)) for m in (model, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.config.d_head == 32 and again.config.kinds == model.config.kinds


def test_two_names_of_a_field_must_agree():
    assert config_of(MOE, num_local_experts=8).experts.count == 8
    with pytest.raises(ValueError, match="num_experts=8 and num_local_experts=9 are the same"):
        config_of(MOE, num_local_experts=9)
    with pytest.raises(ValueError, match="num_attention_heads=2 and n_head=4 are the same field"):
        config_of(GPT2, num_attention_heads=2)
