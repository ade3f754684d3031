"""Read a GGUF file as a Hugging Face checkpoint: the fields of config.json, and tensors by name.

The `gguf` package (extra `hf`) dequantizes, a few rows at a time.
"""

import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from models.checkpoints.gguf_fields import check_is_model, fields_of
from models.checkpoints.gguf_header import Header, Tensor
from models.checkpoints.json_file import is_there, shown
from models.checkpoints.mapped_file import forget_pages

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
_FLOATS = (0, 1, 28, 30)  # the format's numbers of float32, float16, float64 and bfloat16
# A part of a file that was split: its name, its number from 1 on, how many there are
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class _Source(NamedTuple):
    """Where a tensor of the checkpoint is in the file."""

    tensor: Tensor
    expert: int | None  # its index in the tensor, if that has the weights of all experts
    role: str  # GGUF's name of the module


def read_header(file: pathlib.Path) -> Header:
    """The header of a GGUF file that holds a model, or of the first part of a split one.

    Raises:
      ValueError: it is not GGUF, or is truncated or damaged; it holds no model, or is a later part.
    """
    header = Header(file)
    check_is_model(header)
    count = header.integer("split.count", 1)
    number = header.integer("split.no", 0)
    if count > 1 and number:
        match = _PART.fullmatch(file.name)
        first = f"{match[1]}-00001-of-{match[3]}.gguf" if match else "the first part"
        raise ValueError(
            f"{file} is part {number + 1} of {count}; give {first}, which has the rest"
        )
    return header


class GGUF:
    """The tensors of a GGUF file, with the names and layouts of a Hugging Face checkpoint."""

    def __init__(self, file: pathlib.Path) -> None:
        """The tensors of `file`, and of the files beside it if it is split; none is read yet.

        Raises:
          ValueError: the file is not GGUF, its architecture is unknown, a value in it is out of
            range, or the tensors are not exactly those that its metadata ask for.
        """
        header = read_header(file)
        tensors = _all_tensors(header)
        self.fields = fields_of(header, tensors)
        self._family = self.fields["model_type"]
        _check_tensors(header, tensors, self.fields)
        self._heads: dict[str, Any] = {
            "attn_q": self.fields.get("num_attention_heads"),
            "attn_k": self.fields.get("num_key_value_heads"),
        }
        self._sources: dict[str, _Source] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in tensors.items():
            if name != "rope_freqs.weight":
                self._enter(name, tensor)
        self._file = file
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
        data, dimensions = tensor.map(), len(tensor.shape)
        if expert is not None:
            return tensor.dequantize(data[expert][index[0]])[:, index[1]]
        if role in _EXPERTS and dimensions == 3:  # gpt-oss: stored [E, out, in], read [E, in, out]
            experts, columns, outputs = index
            parts = [
                tensor.dequantize(data[e][outputs])
                for e in range(*experts.indices(tensor.shape[0]))
            ]
            return np.stack(parts)[:, :, columns].swapaxes(1, 2)
        if self._family == "gpt2" and role in _TRANSPOSED and dimensions == 2:
            return tensor.dequantize(data[index[1]])[:, index[0]].T
        rows: Any = index[0]
        if self._family == "llama" and role in self._heads:
            rows = _rotary_rows(tensor.shape[0], int(self._heads[role]))[rows]
        if dimensions == 1:
            return tensor.dequantize(data)[rows]
        return tensor.dequantize(data[rows])[:, index[1]]

    def block_kind(self, name: str) -> int | None:
        """The format's number of the type of a tensor's blocks; None if it is stored as floats."""
        source = self._sources.get(name)
        if source is None:  # gpt-oss: gate and up, which are two tensors
            return -1
        return None if source.tensor.kind in _FLOATS else source.tensor.kind

    def rows(self, name: str, outputs: slice) -> np.ndarray:
        """The bytes of some output channels of a weight, or rows of an embedding, as stored."""
        tensor, expert, role = self._sources[name]
        data = tensor.map() if expert is None else tensor.map()[expert]
        if self._family == "llama" and role in self._heads:
            return data[_rotary_rows(tensor.shape[0], int(self._heads[role]))[outputs]]
        return data[outputs]

    def forget(self) -> None:
        """Gives the pages of the file that were read back to the system."""
        forget_pages(
            {
                id(source.tensor.data): source.tensor.data for source in self._sources.values()
            }.values()
        )

    def where(self, name: str) -> str:
        """The file that stores a tensor, for messages."""
        source = self._sources.get(name)
        return str(source.tensor.file if source else self._file)

    def _enter(self, name: str, tensor: Tensor) -> None:
        """Enters a tensor under its name in a Hugging Face checkpoint."""
        # "blk.3.attn_q.weight" is layer 3, role "attn_q", end "weight".
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([a-z_]+?)\.?(weight|bias)?", name)
        layer, role, end = match.groups() if match else (None, name, None)
        shape = tensor.shape
        table, layers = LLAMA, "model.layers"
        if self._family == "gpt2":
            table, layers = _GPT2, "transformer.h"
        root = "" if layer is None else f"{layers}.{layer}."
        if role in _EXPERTS and self._family == "qwen3_moe":
            for expert in range(shape[0]):
                self._add(
                    f"{root}mlp.experts.{expert}.{_EXPERTS[role]}.{end}",
                    shape[1:],
                    _Source(tensor, expert, role),
                )
            return
        if role in _EXPERTS:
            suffix = "_bias" if end == "bias" else ""
            if end == "weight":
                shape = (shape[0], shape[2], shape[1])
            self._add(
                f"{root}mlp.experts.{_EXPERTS[role]}{suffix}", shape, _Source(tensor, None, role)
            )
            return
        if role == "attn_sinks":
            self._add(f"{root}self_attn.sinks", shape, _Source(tensor, None, role))
            return
        module = table[role]
        if self._family == "gpt_oss" and role == "ffn_gate_inp":
            module = "mlp.router"
        if self._family == "gpt2" and role in _TRANSPOSED and len(shape) == 2:
            shape = shape[::-1]
        self._add(f"{root}{module}.{end}", shape, _Source(tensor, None, role))

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


def _all_tensors(header: Header) -> dict[str, Tensor]:
    """The tensors of a file, or of all the parts of a split one.

    Raises:
      ValueError: a part is missing or of another file, or two parts store the same tensor.
    """
    count = header.integer("split.count", 1, most=99_999)
    if count < 2:
        return header.tensors
    match = _PART.fullmatch(header.file.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise header.error(
            "split.count", f"but the file is not named NAME-00001-of-{count:05}.gguf; rename it"
        )
    tensors = dict(header.tensors)
    for number in range(1, count):
        file = header.file.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf")
        if not is_there(file):
            raise ValueError(f"{file} is missing, part {number + 1} of {count} of {header.file}")
        part = Header(file)
        for name, value in (("split.no", number), ("split.count", count)):
            if part.integer(name) != value:
                raise part.error(name, f"is not {value}, as the name of the file says")
        if twice := tensors.keys() & part.tensors.keys():
            raise ValueError(f"{file}: {sorted(twice)[0]!r} is in another part too")
        tensors |= part.tensors
    if header.integer("split.tensors.count", len(tensors)) != len(tensors):
        raise header.error("split.tensors.count", f"but all parts have {len(tensors)}")
    return tensors


def _check_tensors(header: Header, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """Raises ValueError unless the tensors are exactly those that the metadata ask for."""
    optional = {"rope_freqs.weight"} if fields["model_type"] == "llama" else set()
    wanted = _shapes(fields, tensors)
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(
            f"{header.file}: the tensor {missing[0]!r} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    by_kind = {tensor.kind: tensor for tensor in tensors.values()}
    decoded = {kind for kind, tensor in by_kind.items() if tensor.is_known}
    for name, tensor in tensors.items():
        if tensor.kind not in decoded:
            raise ValueError(
                f"{tensor.file}: the tensor {shown(name)} is of a type that is not decoded here "
                f"(number {tensor.kind}); quantize the model anew, as Q8_0 or Q4_K"
            )
        if name in wanted and tensor.shape != wanted[name]:
            raise ValueError(
                f"{tensor.file}: the tensor {name!r} has shape {tensor.shape}, the metadata ask "
                f"for {wanted[name]}{_who_asks(header, tensor.shape, wanted[name])}"
            )
        if name not in wanted and name not in optional:
            raise ValueError(
                f"{tensor.file}: the tensor {shown(name)} is not one of a {fields['model_type']} "
                f"with {len(wanted)} tensors"
            )


def _who_asks(header: Header, found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The metadata that a wanted shape is from, where they differ from the one that was found."""
    sizes = [n for i, n in enumerate(wanted) if found[i : i + 1] != (n,)]
    prefix = f"{header.text('general.architecture')}."
    values = {key: header.value(key) for key in header if key.startswith(prefix)}
    keys = [f"{key}={n}" for key, n in values.items() if isinstance(n, int) and n in sizes]
    return f" ({', '.join(keys)})" if keys else ""


def _shapes(fields: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a model, by GGUF's name."""
    top, block = _gpt2_shapes(fields) if fields["model_type"] == "gpt2" else _llama_shapes(fields)
    if fields["model_type"] == "gpt_oss" and "blk.0.ffn_norm.weight" in tensors:
        block["ffn_norm.weight"] = block.pop("post_attention_norm.weight")  # older converters
    if not fields["tie_word_embeddings"]:
        top["output.weight"] = top["token_embd.weight"]
    layers = fields.get("num_hidden_layers") or fields["n_layer"]
    return top | {
        f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()
    }


_Shapes = dict[str, tuple[int, ...]]


def _gpt2_shapes(fields: dict[str, Any]) -> tuple[_Shapes, _Shapes]:
    """The shapes outside the layers, and of a layer."""
    width, inner = fields["n_embd"], fields["n_inner"]
    block: _Shapes = {}
    for name in ("attn_norm", "ffn_norm"):
        block |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    products = {"attn_qkv": (3 * width, width), "attn_output": (width, width)}
    products |= {"ffn_up": (inner, width), "ffn_down": (width, inner)}
    for name, shape in products.items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {
        "token_embd.weight": (fields["vocab_size"], width),
        "position_embd.weight": (fields["n_positions"], width),
        "output_norm.weight": (width,),
        "output_norm.bias": (width,),
    }, block


def _llama_shapes(fields: dict[str, Any]) -> tuple[_Shapes, _Shapes]:
    """The shapes outside the layers, and of a layer."""
    family, width, inner = (fields[n] for n in ("model_type", "hidden_size", "intermediate_size"))
    heads, kv_heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    rows, kv_rows = heads * fields["head_dim"], kv_heads * fields["head_dim"]
    attention: _Shapes = {
        "attn_q": (rows, width),
        "attn_k": (kv_rows, width),
        "attn_v": (kv_rows, width),
    }
    out: _Shapes = {"attn_output": (width, rows)}
    block: _Shapes = {"attn_norm.weight": (width,)}
    experts = family in ("qwen3_moe", "gpt_oss")
    block["post_attention_norm.weight" if family == "gpt_oss" else "ffn_norm.weight"] = (width,)
    products: _Shapes = {
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    if experts:
        count, inner = fields["num_experts"], fields["moe_intermediate_size"]
        products = {
            "ffn_gate_inp": (count, width),
            "ffn_gate_exps": (count, inner, width),
            "ffn_up_exps": (count, inner, width),
            "ffn_down_exps": (count, width, inner),
        }
    weights = attention | out | products
    biased: _Shapes = {}
    if fields["attention_bias"]:
        biased |= attention if family == "qwen2" else attention | out
    if family == "gpt_oss" or (family == "llama" and fields["mlp_bias"]):
        biased |= products
    block |= {f"{name}.weight": shape for name, shape in weights.items()}
    block |= {f"{name}.bias": shape[:-1] for name, shape in biased.items()}
    if family in ("qwen3", "qwen3_moe"):
        block |= {f"attn_{part}_norm.weight": (fields["head_dim"],) for part in "qk"}
    if family == "gpt_oss":
        block["attn_sinks.weight"] = (heads,)
    return {
        "token_embd.weight": (fields["vocab_size"], width),
        "output_norm.weight": (width,),
    }, block


def _rotary_rows(rows: int, heads: int) -> np.ndarray:
    """The row in a GGUF file of each row of Hugging Face's query or key weight.

    GGUF interleaves the two halves of a head. With one head of 6 rows, rows 0 to 5 are
    GGUF's rows 0, 2, 4, 1, 3, 5.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
