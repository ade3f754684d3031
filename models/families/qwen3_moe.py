"""Qwen3 with mixtures of experts.

A. Yang et al., "Qwen3 Technical Report", 2025, table 2.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.checkpoints.json_file import shown
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
    layers = config_json.layer_count(fields)
    slides = config_json.flag(fields, "use_sliding_window", False)
    windows = config_json.windows(
        {"sliding_window": 4096} | fields | {"layer_types": None},
        (slides and fields.get("sliding_window", 4096) is not None,) * layers,
    )
    sparse = _sparse_layers(fields, layers)
    experts = None
    if any(sparse):
        experts = ExpertsConfig(
            count=config_json.whole(fields, "num_experts", "num_local_experts"),
            chosen=config_json.whole(fields, "num_experts_per_tok", default=8),
            d_ff=config_json.whole(fields, "moe_intermediate_size"),
            normalized=config_json.flag(fields, "norm_topk_prob", False),
            balance=config_json.number(fields, "router_aux_loss_coef", 0.001, zero=True),
        )
    return config_json.decoder(
        fields,
        family="qwen3_moe",
        activation=config_json.activation(fields, "hidden_act", ("swiglu",), "silu"),
        biases=("qkv", "out") if config_json.flag(fields, "attention_bias", False) else (),
        qk_norm=True,
        windows=windows,
        experts=experts,
        sparse_layers=() if all(sparse) or not any(sparse) else sparse,
    )


def _sparse_layers(fields: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """For each layer whether it has experts: every n-th has, but not those listed."""
    every = config_json.whole(fields, "decoder_sparse_step", default=1, least=0)
    dense = fields.get("mlp_only_layers")
    if dense is None:
        dense = []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers={shown(dense)} is not a list of layers' numbers")
    count = config_json.whole(fields, "num_experts", "num_local_experts", default=None, least=0)
    dense_layers = set(dense)
    if not every or count == 0:
        return (False,) * layers
    return tuple(i not in dense_layers and (i + 1) % every == 0 for i in range(layers))


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
        return result | {"num_experts": 0}
    return (
        result
        | config_json.expert_fields(config.experts)
        | {
            "moe_intermediate_size": config.experts.d_ff,
            "norm_topk_prob": config.experts.normalized,
        }
    )
