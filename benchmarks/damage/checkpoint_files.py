"""Folders of models with hostile or damaged files: config.json, safetensors, their index.

A hostile file is one that somebody made: nonsense in a field, a header that promises what the file
does not hold. It must be refused. A damaged one has a flipped bit, or ends too soon. It must be
refused, or give the model that it still describes. Bits of the weights themselves are left out:
nothing in the format could tell.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from benchmarks.damage.case import Case
from benchmarks.damage.headers import CHANGES, Change
from models.checkpoints.reading import load
from models.checkpoints.saving import save
from models.config import DecoderConfig, ExpertsConfig
from models.decoder import Decoder
from models.presets import PRESETS

_MOST_SECONDS = 2.0  # of processor time
_MOST_MEMORY = 256 << 20  # bytes that the process may grow by, beyond the most it had before
_LONGEST_MESSAGE = 2000
_CONFIG, _WHOLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLIPS = 120
_CUTS = 60

_TINY: dict[str, Any] = {
    "vocab": 32,
    "d_model": 16,
    "d_ff": 24,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
}
_TINY |= {"context": 32}
_EXPERTS: dict[str, Any] = {"count": 4, "chosen": 2, "d_ff": 8}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2-124m", {"kv_heads": 4}),
    "llama": ("llama3.1-8b", {}),
    "qwen2": ("qwen2-7b", {"windows": (None, 8)}),
    "qwen3": ("qwen3-8b", {"head_size": 8}),
    "qwen3_moe": ("qwen3-30b-a3b", {"head_size": 8, "experts": ExpertsConfig(**_EXPERTS)}),
    "gpt_oss": ("gpt-oss-20b", {"head_size": 8, "windows": (8, None), "d_ff": 8}),
}

# Values that no field of a kind may have.
_ANY: tuple[Any, ...] = (
    True,
    -1,
    -2.5,
    "3",
    "",
    [],
    [1],
    {},
    {"a": 1},
    float("nan"),
    float("inf"),
    "x" * 10**5,
)
_NONSENSE: dict[str, tuple[Any, ...]] = {
    "size": (*_ANY, 0, 2.5, 16.0, 10**10, 10**30, -(10**20)),
    "number": (*_ANY, None, 0, 1e300, 10**400),
    "spread": (*_ANY, None, 1e300, 10**400),
    "flag": (*_ANY[1:], None, 0, 1, "true"),
    "object": (True, 1, "yarn", [1], 2.5, {"factor": 2.0}, {"rope_type": "x"}, {"rope_type": [1]}),
    "types": (True, 1, "x", ["x"], [1], [["full_attention"]], {"a": 1}, ["full_attention"] * 9),
    "list": (True, 1, "x", [2.5], [None], [[0]], {"a": 1}),
    "names": (True, 1, "LlamaForCausalLM", [1], ["NoModel"], [["LlamaForCausalLM"]], {"a": 1}),
    "activation": (True, 1, "", "tanh", ["silu"], {"a": 1}, None),
    "quantization": (True, 1, "gptq", [1], {"quant_method": "gptq"}, {"quant_method": [1]}),
}
_COMMON = {"vocab_size": "size", "architectures": "names", "tie_word_embeddings": "flag"}
_COMMON |= {"initializer_range": "spread", "quantization_config": "quantization"}
_LLAMA = _COMMON | {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers"), "size"),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), "size"),
    **dict.fromkeys(("rms_norm_eps", "rope_parameters.rope_theta"), "number"),
    **{"max_position_embeddings": "size", "rope_parameters": "object"},
}
_QWEN = _LLAMA | {"hidden_act": "activation", "use_sliding_window": "flag"}
# Large numbers in proper places: more than the file has tensors for.
_LARGE = {"num_hidden_layers", "n_layer", "num_experts", "num_local_experts", "vocab_size"}
_FIELDS: dict[str, dict[str, str]] = {
    "gpt2": _COMMON
    | dict.fromkeys(("n_embd", "n_inner", "n_layer", "n_head", "n_positions"), "size")
    | {"layer_norm_epsilon": "number", "activation_function": "activation"}
    | {"scale_attn_weights": "flag", "scale_attn_by_inverse_layer_idx": "flag"},
    "llama": _LLAMA
    | {"rope_parameters.factor": "number", "rope_parameters.low_freq_factor": "number"}
    | {"rope_parameters.original_max_position_embeddings": "size", "mlp_bias": "flag"},
    "qwen2": _QWEN | {"layer_types": "types", "sliding_window": "size"},
    "qwen3": _QWEN | {"layer_types": "types", "attention_bias": "flag"},
    "qwen3_moe": _QWEN
    | {
        "num_experts": "size",
        "num_experts_per_tok": "size",
        "moe_intermediate_size": "size",
        "norm_topk_prob": "flag",
    }
    | {"mlp_only_layers": "list", "router_aux_loss_coef": "spread"},
    "gpt_oss": _LLAMA
    | {
        "num_local_experts": "size",
        "num_experts_per_tok": "size",
        "swiglu_limit": "number",
        "swiglu_alpha": "number",
    }
    | {"layer_types": "types", "sliding_window": "size", "attention_bias": "flag"},
}


class _Model(NamedTuple):
    """A folder's files, and the parameters that it gives."""

    files: dict[str, bytes]
    parameters: list[np.ndarray]


def cases(seed: int) -> list[Case]:
    """Hostile config.json and safetensors, bit flips and truncations, made from `seed`."""
    source = random.Random(seed)
    return [
        *_hostile_fields(source),
        *_hostile_configs(),
        *_hostile_headers(source),
        *_flips(source),
        *_cuts(source),
    ]


def _hostile_fields(source: random.Random) -> Iterator[Case]:
    """Two nonsense values of each field of each family, and numbers too large for the file."""
    for family, fields in _FIELDS.items():
        for field, kind in fields.items():
            for value in source.sample(_NONSENSE[kind], 2):
                yield _hostile_field(family, field, value)
        for field in sorted(_LARGE & fields.keys()):
            yield _hostile_field(family, field, source.randrange(10**3, 10**7))


def _hostile_field(family: str, field: str, value: Any) -> Case:
    def check(folder: pathlib.Path) -> None:
        files = dict(_model(family).files)
        fields = json.loads(files[_CONFIG])
        inner, names = fields, field.split(".")
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value
        files[_CONFIG] = json.dumps(fields).encode()
        _must_be_refused(folder, files)

    return Case("hostile config.json", f"{family} {field}={str(value)[:40]}", check)


def _hostile_configs() -> Iterator[Case]:
    """Files that are no config.json at all."""
    contents = {
        "empty": b"",
        "a list": b"[1, 2]",
        "null": b"null",
        "not UTF-8": b'{"model_type": "\xff\xfe"}',
        "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
        "100,000 brackets": b"[" * 100_000,
        "100,000 objects": b'{"a":' * 100_000,
        "many lists": b'{"a": [' + b"[]," * 2_000_000 + b"0]}",
        "long": b'{"a": "' + b"x" * 20_000_000 + b'"}',
        "a long number": b'{"vocab_size": ' + b"9" * 100_000 + b"}",
        "no fields": b"{}",
        "a name twice": b'{"vocab_size": 32, "vocab_size": 33}',
    }
    for name, content in contents.items():

        def check_content(folder: pathlib.Path, content: bytes = content) -> None:
            _must_be_refused(folder, _model("llama").files | {_CONFIG: content})

        yield Case("hostile config.json", name, check_content)
    for file in (_CONFIG, _WHOLE):
        for name, make in {
            "a FIFO": os.mkfifo,
            "a folder": os.mkdir,
            "a device": lambda path: os.symlink("/dev/zero", path),
            "a link to itself": lambda path: os.symlink(path, path),
        }.items():
            kind = "hostile config.json" if file == _CONFIG else "hostile safetensors"

            def check(folder: pathlib.Path, file: str = file, make: Any = make) -> None:
                files = dict(_model("llama").files)
                del files[file]
                make(str(folder / file))
                _must_be_refused(folder, files)

            yield Case(kind, f"{file} is {name}", check)


_LENGTHS = (0, 1, 7, 2**20, 2**31, 2**32, 2**63, 2**64 - 1)


def _hostile_headers(source: random.Random) -> Iterator[Case]:
    for name, change in CHANGES.items():
        for _ in range(2):
            family, seed = source.choice(list(_FAMILIES)), source.random()

            def check(
                folder: pathlib.Path,
                change: Change = change,
                family: str = family,
                seed: float = seed,
            ) -> None:
                files = dict(_model(family).files)
                text, data = _split(files[_WHOLE])
                header = json.loads(text)
                metadata = header.pop("__metadata__")
                changed = change(header, random.Random(seed))
                if changed is None:
                    header.setdefault("__metadata__", metadata)
                    changed = json.dumps(header).encode()
                files[_WHOLE] = len(changed).to_bytes(8, "little") + changed + data
                _must_be_refused(folder, files)

            yield Case("hostile safetensors", f"{family}: {name} ({seed:.3f})", check)
    for length in _LENGTHS:

        def check_length(folder: pathlib.Path, length: int = length) -> None:
            files = dict(_model("llama").files)
            files[_WHOLE] = length.to_bytes(8, "little") + files[_WHOLE][8:]
            _must_be_refused(folder, files)

        yield Case("hostile safetensors", f"a header of {length} bytes", check_length)


def _flips(source: random.Random) -> Iterator[Case]:
    for _ in range(_FLIPS):
        file, place, bit = (
            source.choice((_CONFIG, _WHOLE, _INDEX)),
            source.random(),
            source.randrange(8),
        )

        def check(
            folder: pathlib.Path, file: str = file, place: float = place, bit: int = bit
        ) -> None:
            model = _model("llama", split=file == _INDEX)
            content = bytearray(model.files[file])
            # Bits of the weights cannot be noticed.
            size = len(content) if file != _WHOLE else 8 + len(_split(bytes(content))[0])
            content[int(place * size)] ^= 1 << bit
            _must_be_noticed(folder, model, file, bytes(content))

        yield Case("bit flips", f"{file}, bit {bit} at {place:.4f}", check)


def _cuts(source: random.Random) -> Iterator[Case]:
    for _ in range(_CUTS):
        file, place = source.choice((_CONFIG, _WHOLE, _INDEX)), source.random()
        zeros = source.random() < 0.3

        def check(
            folder: pathlib.Path, file: str = file, place: float = place, zeros: bool = zeros
        ) -> None:
            model = _model("llama", split=file == _INDEX)
            content = model.files[file]
            # Weights that a crash left as zeros cannot be noticed.
            header = file == _WHOLE and zeros
            size = 8 + len(_split(content)[0]) if header else len(content)
            cut = content[: int(place * size)]
            if zeros:
                cut = cut.ljust(len(content), b"\0")
            _must_be_noticed(folder, model, file, cut)

        what = "zeros from" if zeros else "ends at"
        yield Case("truncations", f"{file} {what} {place:.4f}", check)


def _must_be_refused(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    _write(folder, files)
    with _limits():
        loaded = _load(folder)
    assert loaded is None, "it was read"


def _must_be_noticed(folder: pathlib.Path, model: _Model, file: str, content: bytes) -> None:
    """The file must be refused, or give the parameters of `model` and the config that it says."""
    _write(folder, model.files | {file: content})
    with _limits():
        loaded = _load(folder)
    if loaded is None:
        return
    pairs = zip(_parameters(loaded), model.parameters, strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs), "other parameters were read"
    said, config = json.loads((folder / _CONFIG).read_bytes()), loaded.config
    rope = said.get("rope_parameters", {})
    found = (config.norm_eps, config.context, config.heads, config.rope_theta, config.tied)
    wanted = (
        *(said.get("rms_norm_eps", 1e-6), said["max_position_embeddings"]),
        *(said["num_attention_heads"], rope.get("rope_theta", 10_000.0)),
        said.get("tie_word_embeddings", False),
    )
    assert found == wanted, f"config.json says {wanted}, the model has {found}"
    kind = config.rope_scaling.kind if config.rope_scaling else "default"
    assert kind == rope.get("rope_type", "default"), f"the scaling is {kind}"
    if config.rope_scaling:
        assert config.rope_scaling.factor == rope["factor"]


def _load(folder: pathlib.Path) -> Decoder | None:
    """The model in a folder; None if it is refused with a message that names a file."""
    try:
        return load(folder)
    except (ValueError, OSError) as error:
        message = str(error)
    assert str(folder) in message, f"the message names no file: {message[:200]}"
    assert len(message) < _LONGEST_MESSAGE, f"the message has {len(message)} characters"
    return None


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Raises AssertionError if the block takes more time or memory than it may."""
    before, began = _peak(), time.process_time()
    yield
    seconds, grown = time.process_time() - began, _peak() - before
    assert seconds < _MOST_SECONDS, f"it took {seconds:.1f} s"
    assert grown < _MOST_MEMORY, f"it took {grown / 1e6:.0f} MB"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def _model(family: str, split: bool = False) -> _Model:
    """A small model of a family, as `save` writes it; `split` over several files."""
    preset, sizes = _FAMILIES[family]
    config: DecoderConfig = dataclasses.replace(PRESETS[preset], **(_TINY | sizes))
    if config.experts is not None:
        experts = dataclasses.replace(config.experts, **_EXPERTS)
        config = dataclasses.replace(config, experts=experts)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save(Decoder(config, rngs=nnx.Rngs(0)), folder, most=4000 if split else 10**9)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        return _Model(files, _parameters(load(folder)))


def _parameters(model: Decoder) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def _split(content: bytes) -> tuple[bytes, bytes]:
    """The header of a safetensors file, and its data."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _write(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
