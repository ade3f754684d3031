"""Qwen3 with mixtures of experts.

A. Yang et al., "Qwen3 Technical Report", 2025, table 2.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig, ExpertsConfig

QWEN3_235B = DecoderConfig(
    vocab=151_936,
    d_model=4096,
    d_ff=12_288,
    layers=94,
    heads=64,
    kv_heads=4,
    context=40_960,
    head_size=128,
    norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
    experts=ExpertsConfig(count=128, chosen=8, d_ff=1536),
    family="qwen3_moe",
)
PRESETS = {
    "qwen3-30b-a3b": dataclasses.replace(
        QWEN3_235B,
        d_model=2048,
        d_ff=6144,
        layers=48,
        heads=32,
        experts=ExpertsConfig(count=128, chosen=8, d_ff=768),
    ),
    "qwen3-235b-a22b": QWEN3_235B,
}
ARCHITECTURE = "Qwen3MoeForCausalLM"
MODEL_TYPE = "qwen3_moe"
NAMES = names.QWEN3_MOE


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    layers = int(config_json.need(fields, "num_hidden_layers"))
    dense, every = fields.get("mlp_only_layers") or (), fields.get("decoder_sparse_step") or 1
    slides = bool(fields.get("use_sliding_window")) and fields.get("sliding_window") is not None
    experts = ExpertsConfig(
        count=int(config_json.need(fields, "num_experts", "num_local_experts")),
        chosen=int(fields.get("num_experts_per_tok", 8)),
        d_ff=int(config_json.need(fields, "moe_intermediate_size")),
        normalized=bool(fields.get("norm_topk_prob", False)),
        balance=float(fields.get("router_aux_loss_coef", 0.001)),
    )
    sparse = tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))
    return config_json.decoder(
        fields,
        family="qwen3_moe",
        activation=config_json.activation(fields, "hidden_act", ("swiglu",), "silu"),
        biases=("qkv", "out") if fields.get("attention_bias") else (),
        qk_norm=True,
        windows=config_json.windows({**fields, "layer_types": None}, (slides,) * layers),
        experts=experts if any(sparse) else None,
        sparse_layers=() if all(sparse) else sparse,
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    window = config.windows[0] if config.windows else None
    result = config_json.decoder_fields(config) | {
        "attention_bias": "qkv" in config.biases,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, kind in enumerate(config.kinds) if not kind.sparse],
    }
    if config.experts is None:
        return result
    return (
        result
        | config_json.expert_fields(config.experts)
        | {
            "moe_intermediate_size": config.experts.d_ff,
            "norm_topk_prob": config.experts.normalized,
        }
    )
