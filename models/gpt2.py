"""This file is the GPT-2 decoders: LayerNorm, learned positions, GELU, biases, a tied head.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. `gpt2-nano` has the
sizes of nanoGPT's setting for a CPU, which trains without biases.
"""

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
    activation="gelu",
    tied=True,
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
    activation="gelu",
    biases=True,
    tied=True,
)

PRESETS = {"gpt2-nano": GPT2_NANO, "gpt2-124m": GPT2_124M}
