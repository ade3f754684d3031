"""Save a model as a Hugging Face checkpoint: config.json and safetensors."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from models.checkpoints import slots, tensors
from models.checkpoints.slots import Piece
from models.config import DecoderConfig
from models.decoder import Decoder
from models.presets import FAMILIES
from models.quantization import is_quantized
from models.quantized import QuantizedTable
from sharding.state import named_leaves
from wsekern.atomic_write import atomic_write

_MOST = 5_000_000_000  # bytes of one file, as transformers splits them
# Fields that must not be copied from the checkpoint that was loaded: `to_fields` writes the later
# style of the first three, and the weights written are not quantized.
_REPLACED = ("rope_theta", "rope_scaling", "torch_dtype", "quantization_config")
# What decides a decoder's results, besides its weights. Biases that are lacking are saved as zeros.
_EXPRESSED = (
    *("vocab", "d_model", "d_ff", "layers", "heads", "kv_heads", "d_head", "context", "norm"),
    *("norm_eps", "positions", "rope_theta", "rope_scaling", "activation", "swiglu_alpha"),
    *("swiglu_limit", "qk_norm", "sinks", "experts", "tied", "kinds"),
)


def save(model: Decoder, folder: str | os.PathLike[str], *, most: int = _MOST) -> None:
    """Writes `model` as a folder that `transformers` and `load` read: config.json, safetensors.

    Parameters keep their dtype; at most one tensor is in the host's memory. Each file is written
    whole or not at all, config.json last. A bias that the family has and the model lacks is written
    as zeros, which computes the same.

    Args:
      model: a decoder.
      folder: the folder to write, made if need be; a checkpoint in it is replaced.
      most: bytes of a file; a larger model is split over several files, with an index.

    Raises:
      ValueError: the family's config.json cannot express a choice of the model, or its weights are
        quantized.
      OSError: the disk is full, or the folder is not writable.
    """
    if is_quantized(model) or isinstance(model.embedding, QuantizedTable):
        raise ValueError(
            "save: the model's weights are quantized, and a checkpoint has floats; load it without "
            "weights=, and save that"
        )
    config = model.config
    family = FAMILIES[config.family]
    written_config = check_savable(config)
    embedding = model.embedding
    fields = _fields(config, np.dtype(embedding.dtype).name)
    state = whole = nnx.state(model)
    if written_config.biases != config.biases:
        widened = dataclasses.replace(config, biases=written_config.biases)
        whole = nnx.state(Decoder.shapes(widened))
    # Of each tensor, the pieces that it stores, and which expert of a piece it is.
    by_name: dict[str, list[tuple[Piece, int | None]]] = {}
    for pieces in slots.pieces(config, whole, family.NAMES.prefix).values():
        for piece in pieces:
            for expert, name in enumerate(piece.names()):
                by_name.setdefault(name, []).append((piece, expert if piece.experts else None))
    leaves = named_leaves(state)
    arrays = {
        name: (
            pieces[0][0].tensor_shape(),
            np.dtype(leaves.get(pieces[0][0].leaf, embedding).dtype),
        )
        for name, pieces in by_name.items()
    }

    def make(name: str) -> np.ndarray:
        shape, dtype = arrays[name]
        tensor = np.zeros(shape, dtype)
        for piece, expert in by_name[name]:
            if piece.leaf in leaves:  # else a bias that the model lacks
                piece.place(tensor, _value(leaves[piece.leaf], piece, expert))
        return tensor

    out = pathlib.Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    old = {*out.glob("*.safetensors"), out / tensors.INDEX}
    written = _write(out, arrays, make, most)
    for file in old - written:  # an older model.safetensors would be read instead of an index
        file.unlink(missing_ok=True)
    _write_json(out / "config.json", fields)


def check_savable(config: DecoderConfig) -> DecoderConfig:
    """The config that a checkpoint of a decoder of `config` will be loaded with.

    Raises:
      ValueError: the family's config.json cannot express a choice of `config`.
    """
    family = FAMILIES[config.family]
    written = family.from_fields(family.to_fields(config))
    # Whatever config.json cannot express must equal the family's default.
    for name in _EXPRESSED:
        if getattr(written, name) != getattr(config, name):
            raise ValueError(
                f"a {config.family} checkpoint cannot say {name}={getattr(config, name)}; it means "
                f"{getattr(written, name)}"
            )
    if missing := set(config.biases) - set(written.biases):
        raise ValueError(
            f"a {config.family} checkpoint has no biases={tuple(sorted(missing))}; it has only "
            f"{written.biases}"
        )
    return written


def _value(leaf: nnx.Variable, piece: Piece, expert: int | None) -> np.ndarray:
    value = leaf.get_value()
    if piece.period is not None:
        value = value[piece.period]
    if expert is not None:
        value = value[expert]
    shape = piece.shape if expert is None else piece.shape[1:]
    return np.asarray(value)[tuple(slice(0, n) for n in shape)]  # without the state's padding


def _write(
    out: pathlib.Path,
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]],
    make: Callable[[str], np.ndarray],
    most: int,
) -> set[pathlib.Path]:
    """Writes the tensors to one file, or to several with an index; returns the files."""
    files: list[dict[str, Any]] = [{}]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in arrays.items()}
    total = 0
    for name, array in arrays.items():
        if files[-1] and total + sizes[name] > most:
            files.append({})
            total = 0
        files[-1][name] = array
        total += sizes[name]
    if len(files) == 1:
        tensors.write(out / tensors.WHOLE, arrays, make)
        return {out / tensors.WHOLE}
    file_of: dict[str, str] = {}
    written: set[pathlib.Path] = set()
    for i, part in enumerate(files, 1):
        file = out / f"model-{i:05}-of-{len(files):05}.safetensors"
        tensors.write(file, part, make)
        file_of |= dict.fromkeys(part, file.name)
        written.add(file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
    _write_json(out / tensors.INDEX, index)
    return written | {out / tensors.INDEX}


def _fields(config: DecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json: the fields of the one that was loaded, then those of the config."""
    family = FAMILIES[config.family]
    loaded = json.loads(config.source) if config.source else {}
    kept = {name: value for name, value in loaded.items() if name not in _REPLACED}
    return (
        kept
        | {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE}
        | family.to_fields(config)
        | {"dtype": dtype, "torch_dtype": dtype}
    )


def _write_json(file: pathlib.Path, fields: dict[str, Any]) -> None:
    with atomic_write(file) as out:
        out.write((json.dumps(fields, indent=2) + "\n").encode())
