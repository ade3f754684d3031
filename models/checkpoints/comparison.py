"""Compare a checkpoint's tensors with its config: they must be exactly those of the model."""

import itertools
import json
import pathlib
import re
from typing import Any

import numpy as np

from models.checkpoints.json_file import shown
from models.checkpoints.names import Names
from models.checkpoints.slots import Piece
from models.checkpoints.tensors import Tensors
from models.config import DecoderConfig
from models.presets import FAMILIES

FLOATS = ("float64", "float32", "float16", "bfloat16")
# What names begin with in a module around the model -> what to save instead
_WRAPPERS = (
    ("module.", "save `model.module` instead of the model"),
    ("_orig_mod.", "save `model._orig_mod` instead of the model"),
    ("base_model.", "merge the adapter into its model (peft's merge_and_unload) and save that"),
)
_MEND = "save the language model alone"
_COMPARED = 2**24  # numbers of the head and the embedding that are compared at once


def prefix_of(names: Names, tensors: Tensors) -> str:
    """What begins the names of the tensors, but not the head's."""
    # Checkpoints of a bare model, without its head, have no prefix; nor has GPT-2's first release.
    return names.prefix if any(name.startswith(names.prefix) for name in tensors.shapes) else ""


def is_parameter(config: DecoderConfig, name: str) -> bool:
    """Whether a tensor is a parameter, not a buffer, nor a head that is the embedding."""
    names: Names = FAMILIES[config.family].NAMES
    return not (f".{name}".endswith(names.ignored) or (config.tied and name == names.head.name))


def compare_counts(
    file: pathlib.Path, fields: dict[str, Any], config: DecoderConfig, tensors: Tensors
) -> None:
    """Compares how many layers, experts and tokens there are, before anything is built of them.

    Args:
      file: config.json or the GGUF file, for messages.
      fields: what it says.
      config: the model of `fields`.
      tensors: the checkpoint's.

    Raises:
      ValueError: the tensors are of more or fewer.
    """
    names: Names = FAMILIES[config.family].NAMES
    prefix = prefix_of(names, tensors)
    numbered = re.compile(rf"{re.escape(f'{prefix}{names.layers}.')}(\d{{1,9}})\.")
    numbers = [int(match[1]) for name in tensors.shapes if (match := numbered.match(name))]
    layers = max(numbers, default=-1) + 1
    if not layers:
        _check_wrapper(names, tensors)
    if config.layers != layers:
        field = "n_layer" if "n_layer" in fields else "num_hidden_layers"
        raise ValueError(
            f"{file}: {field}={config.layers}, but the tensors in {any_file(tensors)} are of "
            f"{layers} layers"
        )
    sizes: list[tuple[tuple[str, ...], int, str]] = [
        (("vocab_size",), config.vocab, prefix + names.top["embedding"].name)
    ]
    if config.experts is not None:
        first = next(i for i, kind in enumerate(config.kinds) if kind.sparse)
        router = f"{prefix}{names.layers}.{first}.{names.block['feed_forward/router'].name}"
        sizes.append((("num_experts", "num_local_experts"), config.experts.count, router))
    for known, size, name in sizes:
        field = next((one for one in known if one in fields), known[0])
        if name not in tensors.shapes:
            raise ValueError(f"{any_file(tensors)}: {name!r} is missing; {file} has {field}={size}")
        if tensors.shapes[name][:1] != (size,):
            raise ValueError(
                f"{file}: {field}={size}, but {name!r} in {tensors.where(name)} is "
                f"{tensors.shapes[name]}"
            )


def _check_wrapper(names: Names, tensors: Tensors) -> None:
    """Raises ValueError if the names of the tensors begin with that of a module around the model.

    They are not read: what else the module does to the model is not known here.
    """
    bare = names.top["embedding"].name
    for name in tensors.shapes:
        if name.endswith(f".{bare}"):
            wrapper = name.removesuffix(bare).removesuffix(names.prefix)
            if wrapper:
                mend = next((mend for of, mend in _WRAPPERS if wrapper.startswith(of)), _MEND)
                raise ValueError(
                    f"{tensors.where(name)}: the tensors are of a module around the model: their "
                    f"names begin with {shown(wrapper)}; {mend}"
                )


def check_tensors(config: DecoderConfig, pieces: dict[str, list[Piece]], tensors: Tensors) -> None:
    """Checks names, shapes and dtypes; reads no tensor.

    Raises:
      ValueError: the tensors are not exactly those of the config.
    """
    every = [piece for of_leaf in pieces.values() for piece in of_leaf]
    # A few suffice: a forged config has many experts.
    absent = (n for piece in every for n in piece.names() if n not in tensors.shapes)
    missing = list(itertools.islice(absent, 4))
    head = FAMILIES[config.family].NAMES.head.name
    if missing == [head]:
        raise ValueError(
            f"{any_file(tensors)}: {head!r} is missing: the checkpoint is of a model without its "
            "head; if the head is the embedding, set tie_word_embeddings to true in config.json"
        )
    if missing:
        raise ValueError(
            f"{any_file(tensors)}: {_some(missing)} missing, which config.json asks for "
            f"({config.layers} layers)"
        )
    wanted = {name: piece.tensor_shape() for piece in every for name in piece.names()}
    for name, shape in wanted.items():
        if tensors.shapes[name] != shape:
            raise ValueError(
                f"{tensors.where(name)}: {name!r} is {tensors.shapes[name]}, config.json asks for "
                f"{shape}{_who_asks(config, tensors.shapes[name], shape)}"
            )
        if tensors.dtypes[name].name not in FLOATS:
            raise ValueError(
                f"{tensors.where(name)}: {name!r} is {tensors.dtypes[name]}, not one of "
                f"{', '.join(FLOATS)}; quantized weights are read in MXFP4 and from GGUF only"
            )
    extra = [name for name in tensors.shapes if name not in wanted and is_parameter(config, name)]
    if extra:
        raise ValueError(
            f"{tensors.where(extra[0])}: {_some(extra)} not used by the model of config.json"
        )


def _who_asks(config: DecoderConfig, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """The fields of config.json that a wanted shape is from, where it differs from the stored."""
    sizes = [n for i, n in enumerate(wanted) if stored[i : i + 1] != (n,)]
    fields = json.loads(config.source) if config.source else {}
    named = [f"{name}={n}" for name, n in fields.items() if type(n) is int and n in sizes]
    return f" ({', '.join(named)})" if named else ""


def check_head(config: DecoderConfig, tensors: Tensors) -> None:
    """Checks that a head which config.json ties to the embedding is not another one in the file.

    transformers took the embedding up to version 4, and takes the file's head from 5 on.

    Raises:
      ValueError: the two differ.
    """
    names: Names = FAMILIES[config.family].NAMES
    head, embedding = names.head.name, prefix_of(names, tensors) + names.top["embedding"].name
    if not config.tied or head not in tensors.shapes:
        return
    rows = max(_COMPARED // max(config.d_model, 1), 1)

    def part(name: str, row: int) -> np.ndarray:
        return tensors.read(name, (slice(row, row + rows), slice(None))).astype(np.float32)

    same = tensors.shapes[head] == tensors.shapes[embedding] and all(
        np.array_equal(part(head, row), part(embedding, row), equal_nan=True)
        for row in range(0, config.vocab, rows)
    )
    if not same:
        raise ValueError(
            f"{tensors.where(head)}: {head!r} is not {embedding!r}, but config.json says that they "
            "are the same (tie_word_embeddings); set it to false to use the file's head, or remove "
            "the head from the file"
        )


def any_file(tensors: Tensors) -> str:
    """The file of some tensor, for messages about one that is missing."""
    return tensors.where(next(iter(tensors.shapes))) if tensors.shapes else "the checkpoint"


def _some(names: list[str]) -> str:
    if len(names) > 3:
        return f"{', '.join(map(shown, names[:3]))} and more are"
    return f"{', '.join(map(shown, names))} {'is' if len(names) == 1 else 'are'}"
