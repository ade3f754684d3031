"""Dense Qwen3: Llama with a norm on each head of queries and keys.

A. Yang et al., "Qwen3 Technical Report", 2025, table 1.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig
from models.families.qwen2 import later_windows, sliding_fields

QWEN3_8B = DecoderConfig(
    vocab=151_936,
    d_model=4096,
    d_ff=12_288,
    layers=36,
    heads=32,
    kv_heads=8,
    context=40_960,
    head_size=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    family="qwen3",
)
PRESETS = {
    "qwen3-0.6b": dataclasses.replace(
        QWEN3_8B, d_model=1024, d_ff=3072, layers=28, heads=16, tied=True
    ),
    "qwen3-1.7b": dataclasses.replace(
        QWEN3_8B, d_model=2048, d_ff=6144, layers=28, heads=16, tied=True
    ),
    "qwen3-8b": QWEN3_8B,
    "qwen3-32b": dataclasses.replace(QWEN3_8B, d_model=5120, d_ff=25_600, layers=64, heads=64),
}
ARCHITECTURE = "Qwen3ForCausalLM"
MODEL_TYPE = "qwen3"
NAMES = names.LLAMA


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    return config_json.decoder(
        {"head_dim": 128} | fields,
        family="qwen3",
        activation=config_json.activation(fields, "hidden_act", ("swiglu",), "silu"),
        biases=("qkv", "out") if config_json.flag(fields, "attention_bias", False) else (),
        qk_norm=True,
        windows=later_windows(fields),
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    biased = {"attention_bias": "qkv" in config.biases}
    return config_json.decoder_fields(config) | sliding_fields(config) | biased
