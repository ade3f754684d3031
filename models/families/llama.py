"""Llama: RMSNorm, rotary positions, SwiGLU, no biases.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, and "The Llama 3 Herd
of Models", 2024. `smollm2-135m`: L. Ben Allal et al., "SmolLM2", 2025. The other sizes below 1b
are ours: `nano` and `20m` read bytes, `125m` has GPT-2's vocabulary.
"""

import dataclasses
from typing import Any

from models.checkpoints import config_json, names
from models.config import DecoderConfig, RopeScaling

_BYTES = 256

NANO = DecoderConfig(
    vocab=_BYTES, d_model=128, d_ff=384, layers=4, heads=4, kv_heads=4, context=64, tied=True
)
LLAMA_20M = DecoderConfig(
    vocab=_BYTES, d_model=448, d_ff=1216, layers=8, heads=8, kv_heads=4, context=256, tied=True
)
LLAMA_125M = DecoderConfig(
    vocab=50_257, d_model=768, d_ff=2048, layers=12, heads=12, kv_heads=12, context=1024, tied=True
)
LLAMA_1B = DecoderConfig(
    vocab=128_256,
    d_model=2048,
    d_ff=8192,
    layers=16,
    heads=32,
    kv_heads=8,
    context=8192,
    rope_theta=500_000.0,
    tied=True,
)
LLAMA3_8B = DecoderConfig(
    vocab=128_256,
    d_model=4096,
    d_ff=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    context=8192,
    rope_theta=500_000.0,
)
LLAMA3_70B = DecoderConfig(
    vocab=128_256,
    d_model=8192,
    d_ff=28_672,
    layers=80,
    heads=64,
    kv_heads=8,
    context=8192,
    rope_theta=500_000.0,
)

_LLAMA31 = RopeScaling(kind="llama3", factor=8.0, original_context=8192)
_LLAMA32 = dataclasses.replace(_LLAMA31, factor=32.0)


def _long(config: DecoderConfig, scaling: RopeScaling) -> DecoderConfig:
    return dataclasses.replace(config, context=131_072, rope_scaling=scaling)


def _llama2(d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig(
        vocab=32_000,
        d_model=d_model,
        d_ff=d_ff,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        context=4096,
    )


PRESETS = {
    "nano": NANO,
    "20m": LLAMA_20M,
    "125m": LLAMA_125M,
    "1b": LLAMA_1B,
    "8b": LLAMA3_8B,
    "70b": LLAMA3_70B,
    "smollm2-135m": DecoderConfig(
        vocab=49_152,
        d_model=576,
        d_ff=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        context=8192,
        rope_theta=100_000.0,
        tied=True,
    ),
    "llama2-7b": _llama2(4096, 11_008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13_824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28_672, 80, 64, 8),
    "codellama-34b": dataclasses.replace(
        _llama2(8192, 22_016, 48, 64, 8), context=16_384, rope_theta=1e6
    ),
    "llama3-8b": LLAMA3_8B,
    "llama3-70b": LLAMA3_70B,
    "llama3.1-8b": _long(LLAMA3_8B, _LLAMA31),
    "llama3.1-70b": _long(LLAMA3_70B, _LLAMA31),
    "llama3.2-1b": _long(LLAMA_1B, _LLAMA32),
    "llama3.2-3b": _long(
        dataclasses.replace(LLAMA_1B, d_model=3072, layers=28, heads=24, kv_heads=8), _LLAMA32
    ),
    "llama3.3-70b": _long(LLAMA3_70B, _LLAMA31),
}
ARCHITECTURE = "LlamaForCausalLM"
MODEL_TYPE = "llama"
NAMES = names.LLAMA


def from_fields(fields: dict[str, Any]) -> DecoderConfig:
    """The config of a model, from config.json."""
    biased = {"attention_bias": ("qkv", "out"), "mlp_bias": ("mlp",)}
    return config_json.decoder(
        fields,
        family="llama",
        activation=config_json.activation(fields, "hidden_act", ("swiglu",), "silu"),
        biases=tuple(
            b
            for name, some in biased.items()
            if config_json.flag(fields, name, False)
            for b in some
        ),
    )


def to_fields(config: DecoderConfig) -> dict[str, Any]:
    """config.json, from the config of a model."""
    return config_json.decoder_fields(config) | {
        "attention_bias": "qkv" in config.biases,
        "mlp_bias": "mlp" in config.biases,
    }
