"""GGUF files that are damaged, or made to mislead: refused by name, or read as they are meant.

A flipped bit of a weight cannot be noticed, as GGUF has no checksums; bits are flipped in headers.
"""

import dataclasses
import math
import os
import pathlib
import random
import resource
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.damage.case import Case
from benchmarks.damage.gguf_writer import (
    LIST,
    TEXT,
    VOCAB,
    WIDTH,
    File,
    Raw,
    Tensor,
    Value,
    small_llama,
)
from models.checkpoints.gguf_header import Header
from models.checkpoints.reading import open_checkpoint
from models.text.reading import load_tokenizer

_SECONDS = 2.0  # of the processor, for one file
_MEMORY = 200_000_000  # bytes
_FLIPS, _CUTS = 150, 60


def cases(seed: int) -> list[Case]:
    """Hostile files, flipped bits of headers, and files that are cut short."""
    rng = random.Random(seed)
    result = []
    for name, change in [*_headers(), *_tensors(rng), *_numbers(rng), *_keys(), *_tokens(rng)]:
        check = _refusal(change, "tokenizer." in name)
        result.append(Case("hostile GGUF files", f"gguf {name}", check))
    for name, make in _no_files().items():
        result.append(Case("hostile GGUF files", f"gguf {name}", _refusal_of(make)))
    whole = small_llama()
    header, size = len(whole.header()), len(whole.header() + whole.data())
    for bit in sorted(rng.sample(range(8 * header), _FLIPS)):
        result.append(Case("GGUF bit flips", f"gguf bit {bit}", _flip(bit)))
    cuts = [rng.randrange(header) for _ in range(_CUTS // 2)]
    cuts += [rng.randrange(header, size) for _ in range(_CUTS // 2)]
    for cut in sorted(cuts):
        result.append(Case("GGUF truncations", f"gguf cut at {cut}", _truncation(cut)))
    return result


_Change = Callable[[File], Any]


def _headers() -> Iterator[tuple[str, _Change]]:
    """Magic, version, counts, lengths and types that are not the format's."""
    for magic in (b"ggml", b"FUGG", b"\0\0\0\0", b"PK\3\4"):
        yield f"magic {magic!r}", _attribute("magic", magic)
    for version in (0, 1, 4, 3 << 24, 2**32 - 1):
        yield f"version {version}", _attribute("version", version)
    for count in (10**15, 2**63, 2**64 - 1, 50_000, 1_000_000):
        yield f"{count} tensors", _attribute("counts", (count, None))
        yield f"{count} values", _attribute("counts", (None, count))
    for length in (2**64 - 1, 2**63, 10**12, 70_000):
        key = Raw(struct.pack("<Q", length) + b"general.name")
        yield f"key of {length} bytes", _add(key, Value("u32", 1))
        text = struct.pack("<IQ", TEXT, length) + b"abc"
        yield f"text of {length} bytes", _add("general.x", Value("raw", text))
        for kind in (TEXT, 0, 6, 12):
            items = Value("raw", struct.pack("<IIQ", LIST, kind, length))
            yield f"list of {length} items of type {kind}", _add("general.x", items)
    for kind in (13, 99, 2**31):
        value = Value("raw", struct.pack("<I", kind) + bytes(8))
        yield f"value of type {kind}", _add("general.x", value)
    nested = struct.pack("<IIQ", LIST, LIST, 2) + struct.pack("<IQ", 0, 0) * 2
    yield "list of lists", _add("general.x", Value("raw", nested))
    yield "bool of 7", _add("general.x", Value("bool", 7))
    for twice in (b"", b"llama.block_count", b"\xff\xfe", b"general.architecture"):
        yield f"key {twice!r} more", _add(twice, Value("u32", 1))
    for name in ("general.architecture", "tokenizer.ggml.pre", "tokenizer.chat_template"):
        latin = Value("raw", struct.pack("<IQ", TEXT, 2) + b"\xff\xfe")
        yield f"{name} of no UTF-8", _setting(name, latin)[1]
    for alignment in (0, 3, 48, 2**31, 4096):
        yield _setting("general.alignment", Value("u32", alignment))
    for one in (Value("text", "32"), Value("f32", 32.0), Value("bool", 1), Value("i32", -32)):
        yield _setting("general.alignment", one)


def _tensors(rng: random.Random) -> Iterator[tuple[str, _Change]]:
    """Tensors of impossible shapes, types and places; tensors that are missing or too many."""
    names = list(small_llama().tensors)

    def changed(**fields: Any) -> tuple[str, _Change]:
        name = rng.choice(names)

        def change(file: File) -> None:
            file.tensors[name] = dataclasses.replace(file.tensors[name], **fields)

        return f"{name} with {fields}"[:90], change

    def added(name: str) -> _Change:
        return lambda file: file.tensors.update({name: Tensor((WIDTH, WIDTH))})

    def removed(name: str) -> _Change:
        return lambda file: file.tensors.pop(name)

    for dimensions in (0, 4, 5, 1000, 2**32 - 1):
        yield changed(dimensions=dimensions)
    for size in (0, -1, 2**63, 2**62, 10**12, 31, 33):
        yield changed(shape=(size, WIDTH))
        yield changed(shape=(WIDTH, size))
    for shape in ((2**32, 2**32), (2**40, 2**40, 2**40), (32, 32, 1, 1, 1), (1,), (7, 5, 3)):
        yield changed(shape=shape)
    for kind in (1, 2, 4, 5, 8, 12, 24, 26, 28, 30, 31, 36, 39, 99, 2**31):
        yield changed(kind=kind)
    for offset in (1, 32, 4096, 10**9, 2**63, 2**64 - 1):
        yield changed(offset=offset)
    for wrong in (b"", b"x" * 70_000, b"\xff", b"output_norm.weight ", b"blk.7.attn_q.weight"):
        yield changed(name=wrong)
    for name in rng.sample(names, 4):
        yield f"without {name}", removed(name)
    for name in ("blk.2.attn_q.weight", "blk.0.attn_q.bias", "x", "blk.0.ffn_gate_exps.weight"):
        yield f"with {name}", added(name)


def _numbers(rng: random.Random) -> Iterator[tuple[str, _Change]]:
    """Numbers of the metadata that are of the wrong type, out of range, or not the tensors'."""
    counts = (
        *("context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "rope.dimension_count"),
    )
    wrong: list[Value | None] = [
        Value("text", "3"),
        Value("f32", 2.0),
        Value("f64", math.nan),
        Value("bool", 1),
    ]
    wrong += [Value("i32", -1), Value("u32", 0), Value("u64", 2**64 - 1), Value("texts", ["2"])]
    wrong += [Value("i32s", []), Value("i32s", [2, 3]), None]
    optional = ("attention.head_count_kv", "rope.dimension_count")
    for name in counts:
        for value in wrong:
            if value is not None or name not in optional:
                yield _setting(f"llama.{name}", value)
        if name != "context_length":
            for number in (10**7, 2**31 - 1, rng.randrange(100, 10**6)):
                yield _setting(f"llama.{name}", Value("u32", number))
    floats = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
    for name in floats:
        for real in (math.nan, math.inf, -math.inf, -1.0, 0.0):
            yield _setting(f"llama.{name}", Value("f32", real))
        for value in (Value("text", "1"), Value("bool", 1), Value("f32s", [1.0, 2.0])):
            yield _setting(f"llama.{name}", value)
    for kind in ("mamba", "", "LLAMA", "llama\0", "clip", "llama" * 1000):
        yield _setting("general.architecture", Value("text", kind))
    yield _setting("general.architecture", None)
    yield _setting("general.architecture", Value("u32", 7))


def _keys() -> Iterator[tuple[str, _Change]]:
    """Keys that ask for another model than the families here."""
    for name, value in {
        "attention.causal": Value("bool", 0),
        "attention.clamp_kqv": Value("f32", 8.0),
        "attention.key_length": Value("u32", 7),
        "attention.max_alibi_bias": Value("f32", 8.0),
        "attention.scale": Value("f32", 0.5),
        "attention.sliding_window": Value("u32", 16),
        "attention.temperature_scale": Value("f32", 0.1),
        "attention.value_length": Value("u32", 4),
        "attn_logit_softcapping": Value("f32", 50.0),
        "embedding_scale": Value("f32", 12.0),
        "expert_count": Value("u32", 10**6),
        "expert_gating_func": Value("u32", 2),
        "expert_shared_count": Value("u32", 1),
        "expert_weights_scale": Value("f32", 2.5),
        "final_logit_softcapping": Value("f32", 30.0),
        "hidden_activation": Value("text", "gelu"),
        "logit_scale": Value("f32", math.nan),
        "nextn_predict_layers": Value("u32", 1),
        "pooling_type": Value("u32", 1),
        "residual_scale": Value("f32", 0.22),
        "rope.dimension_sections": Value("i32s", [1, 1, 2, 0]),
        "rope.freq_base_swa": Value("f32", 1e4),
        "rope.scaling.alpha": Value("f32", 1000.0),
        "rope.scaling.attn_factor": Value("f32", -1.0),
        "rope.scaling.type": Value("text", "longrope"),
        "rope.scaling.yarn_beta_fast": Value("f32", 0.5),
        "rope.scaling.yarn_beta_slow": Value("f32", math.inf),
        "rope.scaling.yarn_ext_factor": Value("f32", 0.0),
        "tensor_data_layout": Value("text", "reference"),
        "use_parallel_residual": Value("bool", 1),
        "vocab_size": Value("u32", 100),
        "what.nobody.knows": Value("u32", 1),
    }.items():
        yield _setting(f"llama.{name}", value)
    yield _setting("qwen2.rope.freq_base", Value("f32", 1e6))
    yield _setting("general.quantization_version", Value("u32", 9))
    for kind in ("adapter", "mmproj", "imatrix", "what", ""):
        yield _setting("general.type", Value("text", kind))
    for count in (2, 3, 65_535):
        yield _setting("split.count", Value("u16", count))


def _tokens(rng: random.Random) -> Iterator[tuple[str, _Change]]:
    """Tokenizers whose lists do not fit, or of kinds that are not known."""
    root = "tokenizer.ggml."
    for name in ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id"):
        for value in (Value("u32", 2**32 - 1), Value("u32", len(VOCAB)), Value("i32", -1)):
            yield _setting(root + name, value)
        yield _setting(root + name, rng.choice([Value("text", "1"), Value("f32", 1.0)]))
    for kind in ("bert", "t5", "rwkv", "plamo2", "what"):
        yield _setting(root + "model", Value("text", kind))
    for kind in ("what", "kimi-k2", "gemma4", ""):
        yield _setting(root + "pre", Value("text", kind))
    twice = [*VOCAB[:-1], rng.choice(VOCAB[:-1])]
    for tokens in (twice, [], VOCAB[:10], [*VOCAB, "more"]):
        yield _setting(root + "tokens", Value("texts", tokens))
    for value in (Value("u32", 3), Value("i32s", [1]), Value("text", "x")):
        yield _setting(root + "token_type", value)
        yield _setting(root + "merges", value)
    yield _setting(root + "merges", None)
    for merge in ("ab", "a b c", " ", "", "a zz", "\0 \0"):
        yield _setting(root + "merges", Value("texts", [merge]))
    for name in ("add_sep_token", "remove_extra_whitespaces", "normalizer.lowercase"):
        yield _setting(root + name, Value("bool", 1))
    yield _setting(root + "add_bos_token", Value("u32", 1))
    yield _setting(root + "what", Value("u32", 1))
    yield _setting("tokenizer.chat_template", Value("u32", 1))


def _no_files() -> dict[str, Callable[[pathlib.Path], Any]]:
    """What is no file of GGUF, by name: it makes one at a path."""

    def sparse(path: pathlib.Path) -> None:
        with path.open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**40))
            file.truncate(2**36)

    def many(path: pathlib.Path) -> None:
        file = small_llama()
        items = struct.pack("<IIQ", LIST, TEXT, 6_000_000) + bytes(8 * 6_000_000)
        file.values.append(("general.x", Value("raw", items)))
        file.write(path)

    def long(path: pathlib.Path) -> None:
        path.write_bytes(small_llama().header() + small_llama().data() + bytes(4096))

    return {
        "FIFO": os.mkfifo,
        "empty file": lambda path: path.touch(),
        "one byte": lambda path: path.write_bytes(b"G"),
        "text": lambda path: path.write_text("GGUF is a format of files.\n" * 9),
        "zeros": lambda path: path.write_bytes(bytes(4096)),
        "a sparse file of 64 GB": sparse,
        "six million empty texts": many,
        "bytes after the last tensor": long,
    }


def _refusal(change: _Change, of_tokens: bool) -> Callable[[pathlib.Path], None]:
    """A check that the file with `change` is refused, by the reader of models or of tokenizers."""

    def make(path: pathlib.Path) -> None:
        file = small_llama()
        change(file)
        file.write(path)

    return _refusal_of(make, load_tokenizer if of_tokens else _read)


def _refusal_of(
    make: Callable[[pathlib.Path], Any], read: Callable[[pathlib.Path], Any] | None = None
) -> Callable[[pathlib.Path], None]:
    def check(folder: pathlib.Path) -> None:
        path = folder / "model.gguf"
        make(path)
        for reader in (read,) if read else (_read, load_tokenizer):
            assert not _reads(reader, path), f"{reader.__name__} reads it"

    return check


def _flip(bit: int) -> Callable[[pathlib.Path], None]:
    """A check that a file with one bit flipped is refused, or read as the peer reads it."""

    def check(folder: pathlib.Path) -> None:
        import gguf

        path = folder / "model.gguf"
        data = bytearray(small_llama().header() + small_llama().data())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        if not all([_reads(_read, path), _reads(load_tokenizer, path)]):
            return
        header, peer = Header(path), gguf.GGUFReader(path)
        for name, field in peer.fields.items():
            if name.startswith("GGUF."):
                continue
            ours, theirs = header.value(name), field.contents()
            if isinstance(theirs, float):
                same = np.float32(ours) == np.float32(theirs)
            else:
                same = list(ours) == theirs if isinstance(theirs, list) else ours == theirs
            assert same, f"{name} is read as {ours!r}, not {theirs!r}"
        for tensor in peer.tensors:
            found = header.tensors[tensor.name]
            assert found.offset == tensor.data_offset, f"{tensor.name} is read from elsewhere"

    return check


def _truncation(cut: int) -> Callable[[pathlib.Path], None]:
    def make(path: pathlib.Path) -> None:
        path.write_bytes((small_llama().header() + small_llama().data())[:cut])

    return _refusal_of(make)


def _read(path: pathlib.Path) -> None:
    """Reads a model's sizes, and all its numbers."""
    _, tensors = open_checkpoint(path)
    for name, shape in tensors.shapes.items():
        tensors.read(name, tuple(slice(0, size) for size in shape))


def _reads(read: Callable[[pathlib.Path], Any], path: pathlib.Path) -> bool:
    """Whether `read` reads a file; if not, it must say why, soon and without taking memory."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read(path)
        return True
    except (ValueError, OSError) as error:
        assert path.name in str(error), f"the error does not name the file: {error}"
        assert len(str(error)) < 2000, "the error is as long as a page"
        return False
    finally:
        seconds = time.process_time() - began
        taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert seconds < _SECONDS, f"{seconds:.1f} s of the processor"
        assert taken < _MEMORY, f"{taken / 1e6:.0f} MB of memory"


def _setting(key: str, value: Value | None) -> tuple[str, _Change]:
    """The name of a case, and the change that sets a key, or takes it out."""

    def change(file: File) -> None:
        file.values = [(name, old) for name, old in file.values if name != key]
        if value is not None:
            file.values.append((key, value))

    if value is None:
        return f"without {key}", change
    return f"{key}={value.value!r}"[:80] + f" as {value.kind}", change


def _attribute(name: str, value: Any) -> _Change:
    return lambda file: setattr(file, name, value)


def _add(key: str | bytes, value: Value) -> _Change:
    return lambda file: file.values.insert(1, (key, value))
