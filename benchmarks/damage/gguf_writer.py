"""Write GGUF files in which anything may be wrong: counts, types, lengths, places."""

import dataclasses
import math
import pathlib
import struct
from typing import Any

import numpy as np

from models.text.bpe import byte_letters

TEXT, LIST = 8, 9  # the format's numbers of these types
_PACKED = {
    "bool": (7, "<B"),
    "f32": (6, "<f"),
    "f64": (12, "<d"),
    "i32": (5, "<i"),
    "u16": (2, "<H"),
    "u32": (4, "<I"),
    "u64": (10, "<Q"),
}
VOCAB = [*byte_letters(), "ab", "<|begin_of_text|>", "<|eot_id|>", "<think>"]
WIDTH, _HEADS, _KV, _INNER, _LAYERS = 32, 4, 2, 48, 2


@dataclasses.dataclass(frozen=True)
class Value:
    """A value of the metadata: the format's name of its type, and what Python calls it."""

    kind: str
    value: Any


@dataclasses.dataclass
class Tensor:
    """A tensor; its offset is that which the format wants unless it is given."""

    shape: tuple[int, ...]
    kind: int = 0
    offset: int | None = None
    name: bytes | None = None
    dimensions: int | None = None


@dataclasses.dataclass
class File:
    """A GGUF file to be written; a case changes a part of it."""

    values: list[tuple[Any, Value]]
    tensors: dict[str, Tensor]
    magic: bytes = b"GGUF"
    version: int = 3
    counts: tuple[int | None, int | None] = (None, None)  # of tensors, of values

    def write(self, path: pathlib.Path) -> pathlib.Path:
        """Writes it to `path`."""
        path.write_bytes(self.header() + self.data())
        return path

    def header(self) -> bytes:
        """All that comes before the data, padded."""
        tensors, values = self.counts
        out = [self.magic, struct.pack("<I", self.version)]
        out.append(struct.pack("<Q", len(self.tensors) if tensors is None else tensors))
        out.append(struct.pack("<Q", len(self.values) if values is None else values))
        for key, value in self.values:
            out += [_text(key), _pack(value)]
        offset = 0
        for name, tensor in self.tensors.items():
            dims = len(tensor.shape) if tensor.dimensions is None else tensor.dimensions
            out.append(_text(name if tensor.name is None else tensor.name))
            out.append(struct.pack("<I", dims))
            out += [struct.pack("<Q", size % 2**64) for size in reversed(tensor.shape)]
            where = offset if tensor.offset is None else tensor.offset
            out.append(struct.pack("<IQ", tensor.kind, where % 2**64))
            offset += -(-4 * math.prod(tensor.shape) // 32) * 32 if tensor.kind == 0 else 0
        header = b"".join(out)
        return header + bytes(-len(header) % 32)

    def data(self) -> bytes:
        """Numbers for the tensors; none for one of another type or of an impossible size."""
        parts = []
        for name, tensor in self.tensors.items():
            if tensor.kind == 0 and 0 < math.prod(tensor.shape) < 10**5:
                numbers = np.random.default_rng(len(name)).normal(size=tensor.shape)
                parts.append(numbers.astype(np.float32).tobytes())
                parts.append(bytes(-len(parts[-1]) % 32))
        return b"".join(parts)


def small_llama() -> File:
    """A small Llama with a tokenizer of bytes."""
    head = WIDTH // _HEADS
    values: list[tuple[Any, Value]] = [("general.architecture", Value("text", "llama"))]
    for name, size in {
        "context_length": 64,
        "embedding_length": WIDTH,
        "block_count": _LAYERS,
        "feed_forward_length": _INNER,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV,
        "rope.dimension_count": head,
    }.items():
        values.append((f"llama.{name}", Value("u32", size)))
    values.append(("llama.attention.layer_norm_rms_epsilon", Value("f32", 1e-5)))
    values.append(("llama.rope.freq_base", Value("f32", 5e5)))
    values.append(("llama.rope.scaling.type", Value("text", "yarn")))
    values.append(("llama.rope.scaling.factor", Value("f32", 4.0)))
    values.append(("llama.rope.scaling.original_context_length", Value("u32", 16)))
    kinds = [1] * 257 + [3, 3, 4]
    for name, value in {
        "model": Value("text", "gpt2"),
        "pre": Value("text", "llama-bpe"),
        "tokens": Value("texts", VOCAB),
        "token_type": Value("i32s", kinds),
        "merges": Value("texts", ["a b"]),
        "bos_token_id": Value("u32", 257),
        "eos_token_id": Value("u32", 258),
    }.items():
        values.append((f"tokenizer.ggml.{name}", value))
    tensors = {
        "token_embd.weight": Tensor((len(VOCAB), WIDTH)),
        "output_norm.weight": Tensor((WIDTH,)),
    }
    for layer in range(_LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (_KV * head, WIDTH),
            "attn_v": (_KV * head, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (_INNER, WIDTH),
            "ffn_up": (_INNER, WIDTH),
            "ffn_down": (WIDTH, _INNER),
        }.items():
            tensors[f"blk.{layer}.{name}.weight"] = Tensor(shape)
    return File(values, tensors)


class Raw(bytes):
    """Bytes that are written as they are, in place of a text with its length."""


def _text(text: str | bytes) -> bytes:
    if isinstance(text, Raw):
        return bytes(text)
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _pack(value: Value) -> bytes:
    """The type of a value, and the value."""
    if value.kind == "raw":
        return value.value
    if value.kind == "text":
        return struct.pack("<I", TEXT) + _text(value.value)
    if value.kind == "texts":
        return struct.pack("<IIQ", LIST, TEXT, len(value.value)) + b"".join(map(_text, value.value))
    number, form = _PACKED[value.kind.removesuffix("s")]
    if value.kind.endswith("s"):
        items = b"".join(struct.pack(form, item) for item in value.value)
        return struct.pack("<IIQ", LIST, number, len(value.value)) + items
    return struct.pack("<I", number) + struct.pack(form, value.value)
