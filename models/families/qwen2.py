"""Qwen2: Llama with biases on queries, keys and values.

A. Yang et al., "Qwen2 Technical Report", 2024, table 1.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig

QWEN2_72B = DecoderConfig(
    vocab=152_064,
    d_model=8192,
    d_ff=29_568,
    layers=80,
    heads=64,
    kv_heads=8,
    context=32_768,
    norm_eps=1e-6,
    rope_theta=1e6,
    biases=("qkv",),
    family="qwen2",
)
PRESETS = {
    "qwen2-0.5b": dataclasses.replace(
        QWEN2_72B,
        vocab=151_936,
        d_model=896,
        d_ff=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        tied=True,
    ),
    "qwen2-7b": dataclasses.replace(
        QWEN2_72B, d_model=3584, d_ff=18_944, layers=28, heads=28, kv_heads=4
    ),
    "qwen2-72b": QWEN2_72B,
}
ARCHITECTURE = "Qwen2ForCausalLM"
MODEL_TYPE = "qwen2"
NAMES = names.LLAMA


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    return config_json.decoder(
        fields,
        family="qwen2",
        activation=config_json.activation(fields, "hidden_act", ("swiglu",), "silu"),
        biases=("qkv",),
        windows=later_windows(fields),
    )


def later_windows(fields: dict[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer, as Qwen's dense models say it; empty if none has one.

    Without `layer_types`, layers have it from number `max_window_layers` on.

    Raises:
      ValueError: a field is of a wrong type, or layers slide in a model that does not.
    """
    layers = config_json.layer_count(fields)
    if not config_json.flag(fields, "use_sliding_window", False):
        return config_json.windows(fields | {"sliding_window": None}, (False,) * layers)
    slides = fields.get("sliding_window", 4096) is not None
    first = config_json.whole(fields, "max_window_layers", default=28, least=0)
    return config_json.windows(
        {"sliding_window": 4096} | fields, tuple(slides and i >= first for i in range(layers))
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    return config_json.decoder_fields(config) | sliding_fields(config)


def sliding_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of Qwen's config.json for the window and the layers that have it."""
    window = config_json.window_fields(config)
    slides = [kind == "sliding_attention" for kind in window["layer_types"]]
    first = slides.index(True) if any(slides) else config.layers
    return window | {"use_sliding_window": any(slides), "max_window_layers": first}
