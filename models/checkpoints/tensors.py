"""Read and write safetensors: a JSON header, then the bytes of many arrays, mapped into memory.

The format is described at https://github.com/huggingface/safetensors. Every number of a header is
checked against the size of the file before it is used: a forged header allocates nothing.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeGuard

import ml_dtypes
import numpy as np

from models.checkpoints.json_file import (
    file_size,
    is_there,
    parse_json,
    read_json,
    refuse_pointer,
    shown,
)
from models.checkpoints.mapped_file import forget_pages
from wsekern.atomic_write import atomic_write

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_MOST_ARRAYS = 65_536  # in a file; a mixture of 128 experts in 94 layers has 37,000 in all
_MOST_HEADER = 16_000_000  # bytes
_MOST_AROUND = 1_000_000  # bytes of the header besides 1,000 for each array; an array takes 100
_MOST_DIMENSIONS = 32  # NumPy had no more before version 2
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Tensors(Protocol):
    """Arrays on disk, by name."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of an array, in the dtype of the file."""

    def where(self, name: str) -> str:
        """The file that stores an array, for messages."""

    def forget(self) -> None:
        """Gives the pages of the files that were read back to the system."""


class _Entry(NamedTuple):
    file: pathlib.Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class SafeTensors:
    """The arrays of safetensors files, mapped into memory: reading copies nothing."""

    def __init__(self, files: Iterable[pathlib.Path]) -> None:
        """The arrays of `files`.

        Raises:
          ValueError: a file is not what its header says, two files store the same name, or there
            is no tensor.
        """
        self._entries: dict[str, _Entry] = {}
        self._maps: dict[pathlib.Path, np.ndarray] = {}
        for file in files:
            for name, entry in _header(file):
                if name in self._entries:
                    raise ValueError(f"{shown(name)} is in {self.where(name)} and in {file}")
                self._entries[name] = entry
            self._maps[file] = np.memmap(file, np.uint8, "r")
        if not self._entries:
            raise ValueError(f"{', '.join(map(str, self._maps))}: no tensor is in it")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}
        self.dtypes = {name: entry.dtype for name, entry in self._entries.items()}
        self.files = {name: entry.file for name, entry in self._entries.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of an array, in the dtype of the file: a view of the file."""
        entry = self._entries[name]
        size = math.prod(entry.shape) * entry.dtype.itemsize
        data = self._maps[entry.file][entry.offset : entry.offset + size]
        return data.view(entry.dtype).reshape(entry.shape)[index]

    def forget(self) -> None:
        """Gives the pages of the files that were read back to the system."""
        forget_pages(self._maps.values())

    def where(self, name: str) -> str:
        """The file that stores an array, for messages."""
        return str(self._entries[name].file)


def open_folder(folder: pathlib.Path) -> SafeTensors:
    """The arrays of a checkpoint's folder: of model.safetensors, or of the files of its index.

    A model.safetensors goes before an index beside it, as in transformers. Without either, the
    folder's safetensors are all read.

    Raises:
      ValueError: there are no safetensors, or a file or an array that the index names is missing.
    """
    whole, index = folder / WHOLE, folder / INDEX
    if is_there(whole):
        return SafeTensors([whole])
    if is_there(index):
        return _open_index(index)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} {_what_instead(folder)}")
    return SafeTensors(files)


def _open_index(index: pathlib.Path) -> SafeTensors:
    folder, file_of = index.parent, read_json(index, _MOST_HEADER).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(v, str) for v in file_of.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    if not file_of:
        raise ValueError(f"{index}: its weight_map is empty: it names no tensor")
    names = sorted(set(file_of.values()))
    for name in names:
        if pathlib.PurePath(name).name != name:  # a path could lead out of the folder
            raise ValueError(f"{index}: {shown(name)} is not a file beside it")
        if not is_there(folder / name):
            raise ValueError(f"{index}: {shown(name)} is missing beside it")
    tensors = SafeTensors(folder / name for name in names)
    for name, file in file_of.items():
        if tensors.files.get(name) != folder / file:
            raise ValueError(
                f"{folder / file} has no {shown(name)}, which {index.name} says it has"
            )
    return tensors


def write(
    file: pathlib.Path,
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]],
    make: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file whole or not at all; one array is in memory at a time.

    Args:
      file: the file to write.
      arrays: shape and dtype of each array, by name.
      make: returns the array of a name; called once for each, in order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in arrays.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the arrays to 8 bytes
    with atomic_write(file) as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for name, (shape, dtype) in arrays.items():
            array = np.asarray(make(name), order="C")
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name!r} is {array.dtype}{array.shape}, not {dtype}{shape}")
            out.write(array.reshape(-1).view(np.uint8).data)


def _what_instead(folder: pathlib.Path) -> str:
    pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern)]
    if pickles:
        return (
            f"holds {sorted(pickles)[0]}, a pickle: reading one runs whatever code is in it; save "
            "the model as safetensors instead (save_pretrained(.., safe_serialization=True))"
        )
    return "is not a checkpoint: it has no *.safetensors"


def _header(file: pathlib.Path) -> Iterator[tuple[str, _Entry]]:
    """The arrays in a file's header, each checked against the size of the file."""
    size = file_size(file)
    with open(file, "rb") as stream:
        first = stream.read(32)
        refuse_pointer(first, str(file))
        stream.seek(8)
        length = int.from_bytes(first[:8], "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{file} is not safetensors, or is truncated: it has {size} bytes and its header "
                f"claims {length}"
            )
        if length > _MOST_HEADER:
            raise ValueError(f"{file}: its header has {length:,} bytes, above {_MOST_HEADER:,}")
        text = stream.read(length)
    if (arrays := text.count(b'"data_offsets"')) > _MOST_ARRAYS:
        raise ValueError(f"{file}: its header names {arrays:,} arrays, above {_MOST_ARRAYS:,}")
    if length > _MOST_AROUND + 1000 * arrays:
        raise ValueError(f"{file}: its header has {length:,} bytes for {arrays:,} arrays")
    if not text.startswith(b"{"):
        raise ValueError(f"{file} is not safetensors: its header is not a JSON object")
    fields = parse_json(text, f"{file}: its header")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{file}: __metadata__={shown(metadata)} is not an object of strings")
    start, spans = 8 + length, []
    for name, field in fields.items():
        entry, begin, end = _entry(file, name, field, start, size)
        spans.append((begin, end, name))
        yield name, entry
    # As the format's own reader asks: arrays follow one another and fill the file.
    reached, before = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin < reached:
            raise ValueError(f"{file}: {before} and {shown(name)} overlap")
        if begin > reached:
            raise ValueError(f"{file}: the {begin - reached} bytes after {before} are of no array")
        reached, before = end, shown(name)
    if reached != size - start:
        raise ValueError(f"{file}: its last {size - start - reached} bytes are of no array")


def _entry(
    file: pathlib.Path, name: str, field: Any, start: int, size: int
) -> tuple[_Entry, int, int]:
    if not isinstance(field, dict):
        raise ValueError(f"{file}: {shown(name)} is not described by an object")
    kind, shape, offsets = (field.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(
            f"{file}: {shown(name)} is of dtype {shown(kind)}, not one of {list(_DTYPES)}"
        )
    if not _are_sizes(shape, _MOST_DIMENSIONS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise ValueError(
            f"{file}: {shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}; "
            f"they must be up to {_MOST_DIMENSIONS} sizes, and two places in the file"
        )
    dtype, (begin, end) = np.dtype(_DTYPES[kind]), offsets
    needed = math.prod(shape) * dtype.itemsize
    if needed != end - begin:
        raise ValueError(
            f"{file}: {shown(name)} is {kind}{shown(shape)}, {shown(needed)} bytes, but has "
            f"{end - begin}"
        )
    if start + end > size:
        raise ValueError(
            f"{file}: {shown(name)} ends at byte {start + end}, the file at {size}: it is truncated"
        )
    return _Entry(file, start + begin, dtype, tuple(shape)), begin, end


def _are_sizes(values: Any, most: int) -> TypeGuard[list[int]]:
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
