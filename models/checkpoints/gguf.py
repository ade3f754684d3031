"""Read a GGUF file as a Hugging Face checkpoint: the fields of config.json, and tensors by name.

The `gguf` package (extra `hf`) reads the file and dequantizes it, a few rows at a time.
"""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from models.config import RopeScaling
from models.rope import stretch

# GGUF's architecture -> DecoderConfig.family
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
}
# GGUF's name of a module -> Hugging Face's
LLAMA = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GPT2 = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
    "attn_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# GPT-2's Conv1D stores [in, out], GGUF always [out, in].
_TRANSPOSED = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


@functools.lru_cache(maxsize=1)  # tokenizer and tensors are read one after the other
def _reader(file: pathlib.Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f"{file} needs the gguf library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # numpy's errors for missing bytes are of many kinds
        raise ValueError(f"{file} is not GGUF, or is truncated: {error}") from error


@functools.lru_cache(maxsize=1)
def metadata(file: pathlib.Path) -> dict[str, Any]:
    """The metadata of a GGUF file, by name.

    Raises:
      ValueError: the file is not GGUF, or the `gguf` package is missing.
    """
    return {name: field.contents() for name, field in _reader(file).fields.items()}


# (the reader's tensor, the number of an expert in it, GGUF's name of the module)
_Source = tuple[Any, int | None, str]


class GGUF:
    """The tensors of a GGUF file, with the names and layouts of a Hugging Face checkpoint."""

    def __init__(self, file: pathlib.Path) -> None:
        """The tensors of `file`; none is read yet.

        Raises:
          ValueError: the file is not GGUF, or its architecture is unknown.
        """
        self._file = file
        self.fields = fields_of(file)
        self._family = self.fields["model_type"]
        self._heads: dict[str, Any] = {
            "attn_q": self.fields.get("num_attention_heads"),
            "attn_k": self.fields.get("num_key_value_heads"),
        }
        self._sources: dict[str, _Source] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
        for name, tensor in tensors.items():
            if name != "rope_freqs.weight":
                self._enter(name, tensor)
        self._fuse_gate_up()
        self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in float32; only the rows of the part are dequantized."""
        if name not in self._sources:  # gpt-oss: columns of gate and up in turn, [E, in, 2 x out]
            first, last, step = index[-1].indices(self.shapes[name][-1])
            if step != 2:
                raise ValueError(f"{name!r} is read by gate or by up, not {index}")
            half = name.replace("gate_up_proj", ("gate_proj", "up_proj")[first % 2])
            return self.read(half, (*index[:-1], slice(first // 2, (last + 1) // 2)))
        tensor, expert, role = self._sources[name]
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if expert is not None:
            return self._rows(tensor, tensor.data[expert], index[0])[:, index[1]]
        if role in _EXPERTS and len(shape) == 3:  # gpt-oss: stored [E, out, in], read [E, in, out]
            experts, columns, outputs = index
            parts = [
                self._rows(tensor, tensor.data[e], outputs)
                for e in range(*experts.indices(shape[0]))
            ]
            return np.stack(parts)[:, :, columns].swapaxes(1, 2)
        if self._family == "gpt2" and role in _TRANSPOSED and len(shape) == 2:
            return self._rows(tensor, tensor.data, index[1])[:, index[0]].T
        rows: Any = index[0]
        if self._family == "llama" and role in self._heads:
            rows = _rotary_rows(shape[0], int(self._heads[role]))[rows]
        out = self._rows(tensor, tensor.data, rows)
        return out[:, index[1]] if len(shape) == 2 else out

    def where(self, name: str) -> str:
        """The file, for messages."""
        del name
        return str(self._file)

    def _rows(self, tensor: Any, data: np.ndarray, rows: slice | np.ndarray) -> np.ndarray:
        import gguf

        if len(tensor.shape) == 1:
            return gguf.dequantize(data, tensor.tensor_type)[rows]
        return gguf.dequantize(np.ascontiguousarray(data[rows]), tensor.tensor_type)

    def _enter(self, name: str, tensor: Any) -> None:
        """Enters a tensor under its name in a Hugging Face checkpoint."""
        # "blk.3.attn_q.weight" is layer 3, role "attn_q", end "weight".
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+?)\.?(weight|bias)?", name)
        layer, role, end = match.groups() if match else (None, name, None)
        shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF lists the inner one first
        table, layers = LLAMA, "model.layers"
        if self._family == "gpt2":
            table, layers = _GPT2, "transformer.h"
        root = "" if layer is None else f"{layers}.{layer}."
        if role in _EXPERTS and self._family == "qwen3_moe":
            for expert in range(shape[0]):
                self._add(
                    f"{root}mlp.experts.{expert}.{_EXPERTS[role]}.{end}",
                    shape[1:],
                    (tensor, expert, role),
                )
            return
        if role in _EXPERTS:
            suffix = "_bias" if end == "bias" else ""
            if end == "weight":
                shape = (shape[0], shape[2], shape[1])
            self._add(f"{root}mlp.experts.{_EXPERTS[role]}{suffix}", shape, (tensor, None, role))
            return
        if role == "attn_sinks":
            self._add(f"{root}self_attn.sinks", shape, (tensor, None, role))
            return
        module = table.get(role)
        if self._family == "gpt_oss" and role == "ffn_gate_inp":
            module = "mlp.router"
        if module is None:
            raise ValueError(f"{self._file}: the tensor {name!r} is not one of {self._family}'s")
        if self._family == "gpt2" and role in _TRANSPOSED and len(shape) == 2:
            shape = shape[::-1]
        self._add(f"{root}{module}.{end}", shape, (tensor, None, role))

    def _add(self, name: str, shape: tuple[int, ...], source: _Source) -> None:
        self.shapes[name], self._sources[name] = shape, source

    def _fuse_gate_up(self) -> None:
        """Presents gpt-oss's gate and up as the one tensor of its Hugging Face checkpoints."""
        if self._family != "gpt_oss":
            return
        for name in [n for n in self.shapes if "experts.gate_proj" in n]:
            shape = self.shapes.pop(name)
            self.shapes.pop(name.replace("gate_proj", "up_proj"))
            self.shapes[name.replace("gate_proj", "gate_up_proj")] = (*shape[:-1], 2 * shape[-1])


def fields_of(file: pathlib.Path) -> dict[str, Any]:
    """The fields of config.json, from the metadata of a GGUF file.

    Raises:
      ValueError: the architecture is unknown, or so is the scaling of its rotary positions.
    """
    values = metadata(file)
    kind = values.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"{file}: architecture {kind!r} is not one of {', '.join(_ARCHITECTURES)}")

    def get(name: str, default: Any = None) -> Any:
        return values.get(f"{kind}.{name}", default)

    tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
    common = {
        "model_type": _ARCHITECTURES[kind],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
    }
    if kind == "gpt2":
        return common | {
            "n_embd": get("embedding_length"),
            "n_inner": get("feed_forward_length"),
            "n_layer": get("block_count"),
            "n_head": get("attention.head_count"),
            "n_positions": get("context_length"),
            "layer_norm_epsilon": get("attention.layer_norm_epsilon", 1e-5),
        }
    biased = "blk.0.attn_q.bias" in tensors
    fields = common | {
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length") or get("expert_feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv", get("attention.head_count")),
        "head_dim": get("attention.key_length") or get("rope.dimension_count"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(file, get, tensors),
        "attention_bias": biased,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "sliding_window": get("attention.sliding_window"),
    }
    if get("expert_count"):
        fields |= {
            "num_experts": get("expert_count"),
            "num_local_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "moe_intermediate_size": get("expert_feed_forward_length"),
            "norm_topk_prob": True,
        }
        if kind == "gpt-oss":
            fields["intermediate_size"] = get("expert_feed_forward_length")
    return fields


def _scaling(
    file: pathlib.Path, get: Callable[..., Any], tensors: dict[str, Any]
) -> dict[str, Any] | None:
    kind, sinks = get("rope.scaling.type"), "blk.0.attn_sinks.weight" in tensors
    if kind in ("linear", "yarn"):
        return {
            "rope_type": kind,
            "factor": get("rope.scaling.factor"),
            "original_max_position_embeddings": get("rope.scaling.original_context_length"),
            "truncate": not sinks,
        }
    if "rope_freqs.weight" not in tensors:
        return None
    # Llama 3: the file has only each frequency's divisor. The largest is the rule's factor; the
    # others must follow from it.
    divisors = np.asarray(tensors["rope_freqs.weight"].data, np.float32)
    factor = float(divisors.max())
    rule = RopeScaling(kind="llama3", factor=factor, original_context=8192)
    theta, half = get("rope.freq_base", 10_000.0), len(divisors)
    plain = theta ** (-np.arange(half, dtype=np.float32) / half)
    if not np.allclose(plain / stretch(plain, rule), divisors, rtol=1e-3):
        raise ValueError(f"{file}: rope_freqs.weight follows no rule that is known here")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": rule.low_frequency_factor,
        "high_freq_factor": rule.high_frequency_factor,
        "original_max_position_embeddings": rule.original_context,
    }


def _rotary_rows(rows: int, heads: int) -> np.ndarray:
    """The row in a GGUF file of each row of Hugging Face's query or key weight.

    GGUF interleaves the two halves of a head. With one head of 6 rows, rows 0 to 5 are
    GGUF's rows 0, 2, 4, 1, 3, 5.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
