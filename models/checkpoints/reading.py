"""Load a checkpoint onto a wafer, and refuse what is not exactly the model of its config.

Each device's part of a parameter is read straight from the memory-mapped file into the array that
stays: no part is in memory twice, and no parameter is whole where a device needs only a part.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.checkpoints import slots
from models.checkpoints.comparison import (
    FLOATS,
    check_head,
    check_tensors,
    compare_counts,
    is_parameter,
    prefix_of,
)
from models.checkpoints.hub import find
from models.checkpoints.json_file import is_there, read_json, shown
from models.checkpoints.mxfp4 import Mxfp4
from models.checkpoints.names import Names
from models.checkpoints.quantized_reading import aligned_empty, read_parts
from models.checkpoints.slots import Piece
from models.checkpoints.tensors import Tensors, open_folder
from models.config import DecoderConfig
from models.decoder import Decoder
from models.presets import FAMILIES, find_family
from models.quantization import Quantization, Weights, quantizable
from models.quantized import Activations, Parts
from sharding.state import named_leaves, unpadded_sharding
from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

_CONFIG = "config.json"
_MOST_CONFIG = 10_000_000  # bytes of a config.json; most have 1,000


def load(
    checkpoint: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike | None = None,
    wafer: Wafer | None = None,
    *,
    weights: Weights | None = None,
    activations: Activations = None,
    order: Literal["in_out", "out_in"] | None = None,
    stacked: bool = True,
    remat: bool = False,
    progress: bool = False,
) -> Decoder:
    """The model of a checkpoint, its parameters laid out on a wafer.

    A device reads its own parts only. A dimension that the grid does not divide is not split. On a
    CPU the parameters are filled in place; elsewhere the host holds one parameter at a time.

    Args:
      checkpoint: a folder with config.json and safetensors; a GGUF file; or the id of a model on
        the Hugging Face hub, for which the local cache is tried first.
      dtype: of parameters and arithmetic; by default the checkpoint's, and float32 on a CPU.
      wafer: where the model goes; by default the current wafer, or one device if there is none.
      weights: None for weights in `dtype`. "int8" keeps them in eight bits, with a scale for each
        output channel; "int4" in four, with a scale and a minimum for each group of 32, embedding
        and head in eight; "stored" as the file does: blocks of a GGUF file of type Q4_0, Q4_1,
        Q5_0, Q5_1 and Q8_0 exactly, others in int8 in groups of 32, floats in `dtype`. Such a model
        cannot be trained or saved.
      activations: with "int8" weights, "int8" or "int16" rounds the inputs of products too, each
        row by a scale of its own. Products are then sums of integers, which is faster. "int16" is
        two such products, and loses nothing more.
      order: of a weight's two dimensions in memory, if it is not quantized; None: the file's. On a
        CPU, the bits of a product with "out_in" do not depend on the number of rows, from two on;
        with "in_out" they may, and a step of 2 to 32 rows takes 0.87 to 0.92 of the time.
      stacked: True stacks layers of one kind in one array, which training scans; False gives each
        layer arrays of its own, which saves `generate` a copy.
      remat: whether the backward pass recomputes each layer instead of storing its values.
      progress: whether to show a progress bar on standard error.

    Raises:
      ValueError: it is not a checkpoint, not of a known family, quantized otherwise than in MXFP4,
        or its tensors are not exactly those of its config; or `weights` or `activations` is not
        known, or one does not go with the other.
      FileNotFoundError: there is no such folder, and no such model in the cache or on the hub.
    """
    quantization = None
    if weights is not None:
        quantization = Quantization(weights=weights, activations=activations)
    elif activations is not None:
        raise ValueError(f"load: activations={activations!r} needs weights='int8'")
    config, tensors = open_checkpoint(checkpoint)
    config = dataclasses.replace(config, stacked=stacked, weights=order or config.weights)
    if dtype is None:
        dtype = default_dtype(config, tensors)
    return read(
        config,
        tensors,
        dtype,
        context.resolve(wafer),
        quantization=quantization,
        remat=remat,
        progress=progress,
    )


def read_config(checkpoint: str | os.PathLike[str]) -> DecoderConfig:
    """The sizes and choices of a checkpoint's model; reads no weights.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model on the Hugging Face hub.

    Raises:
      ValueError: it is not a checkpoint, or not of a family that is known here.
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
    """
    return open_checkpoint(checkpoint)[0]


def open_checkpoint(checkpoint: str | os.PathLike[str]) -> tuple[DecoderConfig, Tensors]:
    """The config and the tensors of a checkpoint; no tensor is read yet.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model on the Hugging Face hub.

    Raises:
      ValueError: it is not a checkpoint, not of a known family, or quantized otherwise than in
        MXFP4.
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
    """
    path = find(checkpoint)
    if path.is_file():
        file, (fields, tensors) = path, _open_gguf(path)
    else:
        file, (fields, tensors) = path / _CONFIG, _open_folder(path)
    try:
        config = find_family(fields).from_fields(fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    compare_counts(file, fields, config, tensors)
    return config, tensors


def _open_gguf(file: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    from models.checkpoints.gguf import GGUF  # needs the extra `hf`

    tensors = GGUF(file)
    return tensors.fields, tensors


def _open_folder(path: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    fields = read_fields(path)
    quantization = fields.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise ValueError(
            f"{path / _CONFIG}: quantization_config={shown(quantization)} is not an object"
        )
    if quantization and (method := quantization.get("quant_method")) != "mxfp4":
        raise ValueError(
            f"{path / _CONFIG}: quantization_config says that the weights are quantized by "
            f"{shown(method)}, only 'mxfp4' is decoded; load the original, or save it dequantized"
        )
    return fields, Mxfp4(open_folder(path))


def read_fields(folder: pathlib.Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
      ValueError: it is missing, or not a JSON object.
    """
    file = folder / _CONFIG
    if not is_there(file):
        raise ValueError(
            f"{folder} is not a checkpoint: it has no {_CONFIG}{_what_instead(folder)}"
        )
    return read_json(file, _MOST_CONFIG)


def _what_instead(folder: pathlib.Path) -> str:
    if (folder / "adapter_config.json").exists():
        return "; it is an adapter: merge it into its model (peft's merge_and_unload) and save that"
    if files := sorted(folder.glob("*.gguf")):
        return f"; of a GGUF file, give the path: {files[0]}"
    return ""


def read(
    config: DecoderConfig,
    tensors: Tensors,
    dtype: jax.typing.DTypeLike,
    wafer: Wafer | None,
    *,
    quantization: Quantization | None = None,
    remat: bool = False,
    progress: bool = False,
) -> Decoder:
    """The decoder of `config` with parameters from `tensors`.

    Args:
      config: from `open_checkpoint`, perhaps with another `stacked`.
      tensors: from `open_checkpoint`.
      dtype: of parameters and arithmetic.
      wafer: where the model goes; None for one device.
      quantization: how weights are kept; None for all in `dtype`.
      remat: whether the backward pass recomputes each layer instead of storing its values.
      progress: whether to show a progress bar on standard error.

    Raises:
      ValueError: the tensors are not exactly those of the config.
    """
    graph, state = nnx.split(Decoder.shapes(config, dtype=dtype, remat=remat))
    pieces = slots.pieces(config, state, prefix_of(FAMILIES[config.family].NAMES, tensors))
    check_tensors(config, pieces, tensors)
    check_head(config, tensors)
    leaves = named_leaves(state)
    integers = dict(quantizable(state)) if quantization else {}
    values: dict[str, jax.Array] = {}
    quantized: dict[str, Parts] = {}
    with _progress_bar(progress, sum(map(len, pieces.values()))) as advance:
        for path, of_leaf in pieces.items():
            leaf, axes = leaves[path], leaves[path].get_metadata()["axes"]
            parts = None
            if quantization and path in integers:
                parts = read_parts(of_leaf, axes, tensors, quantization)
            if parts is None:
                values[path] = _read_parameter(
                    leaf, of_leaf, tensors, np.dtype(dtype), wafer, advance
                )
            else:
                quantized[path] = parts
                for _ in of_leaf:
                    advance()
            tensors.forget()
    paths = iter(leaves)

    def with_value(leaf: nnx.Variable) -> nnx.Variable:
        return leaf.replace(values.get(next(paths), leaf.get_value()))

    full = jax.tree.map(with_value, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    model = nnx.merge(graph, full)
    for path, parts in quantized.items():
        assert quantization is not None
        quantization.install(model, path, leaves[path].get_metadata()["axes"], parts, wafer)
    return model


def stored_dtype(config: DecoderConfig, tensors: Tensors) -> np.dtype:
    """The dtype that holds every parameter of a checkpoint exactly; buffers do not count.

    float64 counts as float32, the widest that a model computes in.

    Args:
      config: from `open_checkpoint`.
      tensors: from `open_checkpoint`.
    """
    dtypes = [
        np.dtype(np.float32) if dtype == np.float64 else dtype
        for name, dtype in tensors.dtypes.items()
        if is_parameter(config, name) and dtype.name in FLOATS
    ]
    return np.dtype(functools.reduce(jnp.promote_types, dtypes) if dtypes else np.float32)


def default_dtype(config: DecoderConfig, tensors: Tensors) -> jax.typing.DTypeLike:
    """The dtype that `load` takes by itself: the checkpoint's, and float32 on a CPU.

    Args:
      config: from `open_checkpoint`.
      tensors: from `open_checkpoint`.
    """
    if jax.default_backend() == "cpu":
        return jnp.float32
    names: Names = FAMILIES[config.family].NAMES
    name = prefix_of(names, tensors) + names.top["embedding"].name
    dtype = tensors.dtypes.get(name, np.dtype(np.float32))
    return dtype if dtype.name in ("float16", "bfloat16") else jnp.float32


def _read_parameter(
    leaf: nnx.Variable,
    pieces: list[Piece],
    tensors: Tensors,
    dtype: np.dtype,
    wafer: Wafer | None,
    advance: Callable[[], None],
) -> jax.Array:
    """One parameter; each device's part is read from the file into its place."""
    shape = leaf.shape
    stacked = pieces[0].period is not None
    sharding = unpadded_sharding(leaf, wafer)
    parts: dict[Any, Any] = {}
    arrays = []
    places: dict[Any, Any] = dict(sharding.addressable_devices_indices_map(shape))
    for device, index in places.items():
        index = tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))
        key = tuple((i.start, i.stop) for i in index)
        if key not in parts:
            parts[key] = _read_part(pieces, tensors, dtype, index, stacked, advance)
            advance = _ignore  # progress counts each piece once, not once a device
        arrays.append(jax.device_put(parts[key], device))
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(
    pieces: list[Piece],
    tensors: Tensors,
    dtype: np.dtype,
    index: tuple[slice, ...],
    stacked: bool,
    advance: Callable[[], None],
) -> np.ndarray:
    out = aligned_empty(tuple(i.stop - i.start for i in index), dtype)
    if not stacked:
        pieces[0].read_into(out, tensors, index)
        advance()
        return out
    for i, period in enumerate(range(index[0].start, index[0].stop)):
        pieces[period].read_into(out[i], tensors, index[1:])
        advance()
    return out


def _ignore() -> None:
    pass


@contextlib.contextmanager
def _progress_bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, if `shown`; the context gives a function to advance it."""
    if not shown:
        yield _ignore
        return
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading", total=total)
        yield lambda: progress.advance(task)
