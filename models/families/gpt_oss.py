"""gpt-oss: attention sinks, a window in every other layer, biases, experts.

OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig, ExpertsConfig, RopeScaling
from models.rope import yarn_attention_factor

_YARN = RopeScaling(
    kind="yarn",
    factor=32.0,
    original_context=4096,
    truncate=False,
    attention_factor=yarn_attention_factor(32.0),
)
GPT_OSS_120B = DecoderConfig(
    vocab=201_088,
    d_model=2880,
    d_ff=2880,
    layers=36,
    heads=64,
    kv_heads=8,
    context=131_072,
    head_size=64,
    rope_theta=150_000.0,
    rope_scaling=_YARN,
    activation="clamped_swiglu",
    biases=("qkv", "out"),
    sinks=True,
    windows=(128, None) * 18,
    experts=ExpertsConfig(count=128, chosen=4, d_ff=2880, router="top_softmax", biases=True),
    family="gpt_oss",
)
PRESETS = {
    "gpt-oss-20b": dataclasses.replace(
        GPT_OSS_120B,
        layers=24,
        windows=(128, None) * 12,
        experts=ExpertsConfig(count=32, chosen=4, d_ff=2880, router="top_softmax", biases=True),
    ),
    "gpt-oss-120b": GPT_OSS_120B,
}
ARCHITECTURE = "GptOssForCausalLM"
MODEL_TYPE = "gpt_oss"
NAMES = names.GPT_OSS


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    rope = config_json.rope(fields, 150_000.0)
    if not fields.get("rope_scaling") and not fields.get("rope_parameters"):
        rope["rope_scaling"] = _YARN
    slides = tuple(i % 2 == 0 for i in range(config_json.layer_count(fields)))
    return config_json.decoder(
        {"head_dim": 64, "rms_norm_eps": 1e-5} | fields,
        family="gpt_oss",
        activation="clamped_swiglu",
        swiglu_alpha=config_json.number(fields, "swiglu_alpha", 1.702),
        swiglu_limit=config_json.number(fields, "swiglu_limit", 7.0),
        biases=("qkv", "out") if config_json.flag(fields, "attention_bias", True) else (),
        sinks=True,
        windows=config_json.windows({"sliding_window": 128} | fields, slides),
        experts=ExpertsConfig(
            count=config_json.whole(fields, "num_local_experts", "num_experts"),
            chosen=config_json.whole(fields, "num_experts_per_tok", "experts_per_token", default=4),
            d_ff=config_json.whole(fields, "intermediate_size"),
            router="top_softmax",
            biases=True,
            balance=config_json.number(fields, "router_aux_loss_coef", 0.001, zero=True),
        ),
        **rope,
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    result = (
        config_json.decoder_fields(config)
        | config_json.window_fields(config)
        | {
            "attention_bias": "qkv" in config.biases,
            "swiglu_alpha": config.swiglu_alpha,
            "swiglu_limit": config.swiglu_limit,
        }
    )
    if config.experts is None:
        return result
    return (
        result
        | config_json.expert_fields(config.experts)
        | {"intermediate_size": config.experts.d_ff}
    )
