"""GPT-2 and Cerebras-GPT: LayerNorm, learned positions, GELU, biases, a tied head.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019; N. Dey et al.,
"Cerebras-GPT: Open Compute-Optimal Language Models Trained on the Cerebras Wafer-Scale Cluster",
2023, table 1. `gpt2-nano` has the sizes of nanoGPT's configuration for a CPU, which trains without
biases.
"""

import dataclasses
import json
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig

GPT2_NANO = DecoderConfig(
    vocab=256,
    d_model=128,
    d_ff=512,
    layers=4,
    heads=4,
    kv_heads=4,
    context=64,
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    tied=True,
    family="gpt2",
)
GPT2_124M = DecoderConfig(
    vocab=50_257,
    d_model=768,
    d_ff=3072,
    layers=12,
    heads=12,
    kv_heads=12,
    context=1024,
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    biases=("qkv", "out", "mlp", "norm"),
    tied=True,
    family="gpt2",
)


def _gpt2(d_model: int, layers: int, heads: int) -> DecoderConfig:
    return dataclasses.replace(
        GPT2_124M, d_model=d_model, d_ff=4 * d_model, layers=layers, heads=heads, kv_heads=heads
    )


def _cerebras(d_model: int, layers: int, head_size: int, d_ff: int | None = None) -> DecoderConfig:
    config = _gpt2(d_model, layers, d_model // head_size)
    d_ff = 4 * d_model if d_ff is None else d_ff
    return dataclasses.replace(config, d_ff=d_ff, context=2048, activation="gelu")


PRESETS = {
    "gpt2-nano": GPT2_NANO,
    "gpt2-124m": GPT2_124M,
    "gpt2-355m": _gpt2(1024, 24, 16),
    "gpt2-774m": _gpt2(1280, 36, 20),
    "gpt2-1.5b": _gpt2(1600, 48, 25),
    "cerebras-gpt-111m": _cerebras(768, 10, 64),
    "cerebras-gpt-256m": _cerebras(1088, 14, 64),
    "cerebras-gpt-590m": _cerebras(1536, 18, 128),
    "cerebras-gpt-1.3b": _cerebras(2048, 24, 128),
    "cerebras-gpt-2.7b": _cerebras(2560, 32, 80),
    "cerebras-gpt-6.7b": _cerebras(4096, 32, 128),
    "cerebras-gpt-13b": _cerebras(5120, 40, 128),
}
ARCHITECTURE = "GPT2LMHeadModel"
MODEL_TYPE = "gpt2"
NAMES = names.GPT2


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    # transformers takes GPT-2's sizes under both names.
    d_model = config_json.whole(fields, "hidden_size", "n_embd")
    heads = config_json.whole(fields, "num_attention_heads", "n_head")
    if d_model % heads:
        raise ValueError(f"n_embd={d_model} is not a multiple of n_head={heads}")
    return DecoderConfig(
        vocab=config_json.whole(fields, "vocab_size"),
        d_model=d_model,
        d_ff=config_json.whole(fields, "n_inner", default=4 * d_model),
        layers=config_json.layer_count(fields, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=heads,
        context=config_json.whole(fields, "max_position_embeddings", "n_positions"),
        norm="layer",
        norm_eps=config_json.number(fields, "layer_norm_epsilon", 1e-5),
        positions="learned",
        activation=config_json.activation(
            fields, "activation_function", ("gelu", "gelu_tanh", "relu"), "gelu_new"
        ),
        biases=("qkv", "out", "mlp", "norm"),
        scaled_attention=config_json.flag(fields, "scale_attn_weights", True),
        scaled_by_layer=config_json.flag(fields, "scale_attn_by_inverse_layer_idx", False),
        tied=config_json.flag(fields, "tie_word_embeddings", True),
        init_std=config_json.number(fields, "initializer_range", 0.02, zero=True),
        weights="in_out",
        family="gpt2",
        source=json.dumps(fields),
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    names_of = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
    return {
        "vocab_size": config.vocab,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_positions": config.context,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": names_of[config.activation],
        "scale_attn_weights": config.scaled_attention,
        "scale_attn_by_inverse_layer_idx": config.scaled_by_layer,
        "tie_word_embeddings": config.tied,
        "initializer_range": config.init_std,
    }
