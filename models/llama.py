"""This file is the Llama decoders: RMSNorm, rotary positions, SwiGLU, no biases.

Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, and "The Llama 3 Herd
of Models", 2024. The sizes below 1b are ours: `nano` and `20m` for bytes,
`125m` for GPT-2's vocabulary.
"""

from models.config import DecoderConfig

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

PRESETS = {
    "nano": NANO,
    "20m": LLAMA_20M,
    "125m": LLAMA_125M,
    "1b": LLAMA_1B,
    "8b": LLAMA3_8B,
    "70b": LLAMA3_70B,
}
