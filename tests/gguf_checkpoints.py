"""Write GGUF files, as the scripts of llama.cpp do, from tiny Hugging Face checkpoints."""

from typing import Any

import gguf
import numpy as np

from models.checkpoints import tensors

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
}


def read_all(folder):
    source = tensors.open_folder(folder)
    return {n: source.read(n, tuple(slice(None) for _ in s)) for n, s in source.shapes.items()}


def write_gguf(file, kind, fields, values, quantized: Any = None):
    """Writes a GGUF file as the llama.cpp scripts do.

    Args:
      file: where to.
      kind: the architecture.
      fields: the metadata.
      values: the tensors.
      quantized: the type of matrices, or a function from a name to it; None: float32.
    """
    writer = gguf.GGUFWriter(file, kind)
    for key, value in fields.items():
        add: dict[type, Any] = {
            int: writer.add_int32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        else:
            add[type(value)](key, value)
    for name, value in values.items():
        value = np.ascontiguousarray(value, np.float32)
        raw: Any = quantized
        if not isinstance(quantized, gguf.GGMLQuantizationType | None):
            raw = quantized(name)
        if raw is not None and value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, raw), raw_dtype=raw)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def interleave_halves(weight, heads):
    """The rows of queries or keys as llama files have them: a head's two halves interleaved."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def size_fields(kind, fields):
    renamed = {
        "context_length": fields["max_position_embeddings"],
        "embedding_length": fields["hidden_size"],
        "block_count": fields["num_hidden_layers"],
        "feed_forward_length": fields["intermediate_size"],
        "attention.head_count": fields["num_attention_heads"],
        "attention.head_count_kv": fields["num_key_value_heads"],
        "attention.key_length": fields.get("head_dim", 16),
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": float(fields.get("rope_theta", 10_000.0)),
    }
    return {f"{kind}.{key}": value for key, value in renamed.items()}


def gguf_names(values):
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    renamed = {}
    for name, value in values.items():
        root, _, end = name.rpartition(".")
        if root in top:
            renamed[f"{top[root]}.{end}"] = value
        else:
            _, _, layer, rest = root.split(".", 3)
            renamed[f"blk.{layer}.{NAMES[rest]}.{end}"] = value
    return renamed
