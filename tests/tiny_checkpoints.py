"""Tiny checkpoints of every family, and what `transformers` computes from them.

`python tests/tiny_checkpoints.py > tests/models/golden.json` writes the reference for tests on
machines without transformers and torch; it needs both. The tensors' names seed their weights, so
that they are the same everywhere.
"""

import json
import pathlib
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from models.checkpoints import slots, tensors
from models.presets import FAMILIES, find_family

VOCAB, T, PROMPT, NEW = 97, 33, 13, 16
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _like(family: str, **fields: Any) -> dict[str, Any]:
    kind = FAMILIES[family]
    start = {"architectures": [kind.ARCHITECTURE], "model_type": kind.MODEL_TYPE}
    return start | _SIZES | {"tie_word_embeddings": False} | fields


# config.json of each; those with rope_theta are in the style of transformers 4, the others of 5.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "cerebras-gpt": _GPT2 | {"activation_function": "gelu", "n_inner": 80},
    "llama3": _like(
        "llama",
        rope_theta=5e5,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-biased-tied": _like(
        "llama",
        tie_word_embeddings=True,
        num_key_value_heads=1,
        head_dim=32,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    ),
    "qwen2-sliding": _like(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_theta=1e6
    ),
    "qwen3-yarn": _like(
        "qwen3",
        head_dim=32,
        rope_theta=1e6,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "qwen3-moe": _like(
        "qwen3_moe",
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        mlp_only_layers=[1],
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "gpt-oss": _like(
        "gpt_oss",
        num_hidden_layers=4,
        head_dim=32,
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=7,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "truncate": False,
        },
    ),
}


def make(folder: pathlib.Path, fields: dict[str, Any], *, seed: int = 0) -> pathlib.Path:
    """Writes a checkpoint with config.json `fields`; each tensor's name seeds its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    shapes = tensor_shapes(fields)

    def weights(name: str) -> np.ndarray:
        random = np.random.default_rng([zlib.crc32(name.encode()), seed])
        values = 0.1 * random.standard_normal(shapes[name], np.float32)
        return values + np.float32("norm" in name or "ln_" in name) * name.endswith("weight")

    arrays = {name: (shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    tensors.write(folder / "model.safetensors", arrays, weights)
    return folder


def tensor_shapes(fields: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a checkpoint with config.json `fields`."""
    from flax import nnx

    from models.decoder import Decoder

    family = find_family(fields)
    config = family.from_fields(fields)
    state = nnx.state(Decoder.shapes(config))
    pieces = slots.pieces(config, state, family.NAMES.prefix)
    return {
        name: piece.tensor_shape()
        for of_leaf in pieces.values()
        for piece in of_leaf
        for name in piece.names()
    }


def tokens(length: int = T) -> np.ndarray:
    """Two sequences of tokens."""
    return np.random.default_rng(7).integers(0, VOCAB, (2, length)).astype(np.int32)


def by_transformers(folder: pathlib.Path) -> dict[str, Any]:
    """Logits, loss, norm of the gradient and greedy text of a checkpoint, by `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    ids = torch.tensor(tokens()).long()
    out = model(ids, labels=ids)
    out.loss.backward()
    norm = sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None) ** 0.5
    text = model.generate(ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return {
        "logits": out.logits.detach().numpy(),
        "loss": out.loss.item(),
        "gradient_norm": float(norm),
        "text": text.numpy(),
    }


def _golden_values() -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as root:
        for name, fields in CONFIGS.items():
            result = by_transformers(make(pathlib.Path(root, name), fields))
            some = result["logits"][:, ::8, ::16].astype(float).round(5).tolist()
            yield name, {**result, "logits": some, "text": result["text"][:, PROMPT:].tolist()}


if __name__ == "__main__":
    lines = (f"{json.dumps(name)}: {json.dumps(golden)}" for name, golden in _golden_values())
    sys.stdout.write("{\n" + ",\n".join(lines) + "\n}\n")
