"""Read the header of a GGUF file: its metadata, and where its tensors are.

The format is described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count,
length and offset is compared with the size of the file before it is used. Lists are decoded only
when they are asked for: the vocabulary and its merges are most of a header.
"""

import math
import pathlib
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from models.checkpoints.json_file import file_size, shown
from wsekern.error_line import printable

_STRING, _LIST = 8, 9
# The format's number of each type of value that has a fixed size -> NumPy's name of it
_SCALARS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_LENGTH = struct.Struct("<Q")
_NUMBER = struct.Struct("<I")
# A real file has some 50 values, 2,000 tensors and 400,000 strings.
_MOST_VALUES, _MOST_TENSORS, _MOST_STRINGS = 20_000, 100_000, 2_000_000
_LONGEST_NAME = 65_535  # bytes; the format's limit of a key
_MOST_DIMENSIONS = 4
_F32, _F16 = 0, 1  # the format's numbers of these types of tensors


class Tensor(NamedTuple):
    """Where a tensor is."""

    file: pathlib.Path
    kind: int  # the format's number of its quantization
    shape: tuple[int, ...]  # the inner dimension last
    offset: int  # bytes, from the begin of the file
    row: int  # bytes of a row: of all numbers along the inner dimension
    data: np.ndarray  # all bytes of the file, mapped once: another may come to have its name

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape[:-1]) * self.row

    @property
    def is_known(self) -> bool:
        """Whether `dequantize` can decode it."""
        try:
            self.dequantize(np.zeros((1, self.row), np.uint8))
        except NotImplementedError:
            return False
        return True

    def map(self) -> np.ndarray:
        """Its bytes, a row along the last axis: a view of the file."""
        data = self.data[self.offset : self.offset + self.size]
        return data.reshape(*self.shape[:-1], self.row)

    def dequantize(self, rows: np.ndarray) -> np.ndarray:
        """The numbers, float32, of rows of `map()`."""
        if self.kind in (_F32, _F16):
            kind = "<f4" if self.kind == _F32 else "<f2"
            return np.ascontiguousarray(rows).view(kind).astype(np.float32, copy=False)
        import gguf

        return gguf.dequantize(np.ascontiguousarray(rows), gguf.GGMLQuantizationType(self.kind))


class _Value(NamedTuple):
    """Where a value is."""

    kind: int  # the format's number of its type; of its items if it is a list
    items: int | None  # None if it is not a list
    offset: int
    end: int


class Header:
    """The metadata of a GGUF file, by name, and its tensors."""

    def __init__(self, file: pathlib.Path) -> None:
        """Reads the header of `file`.

        Raises:
          ValueError: it is not a regular file, or not GGUF, or is truncated or damaged.
          OSError: it cannot be read.
        """
        self.file = file
        self._size = file_size(file)
        self._map = np.memmap(file, np.uint8, "r") if self._size else np.empty(0, np.uint8)
        self._data = self._map.data
        self._strings = 0
        if self._size < 24 or self._data[:4] != b"GGUF":
            raise self._damage(
                "it does not begin with 'GGUF'; a checkpoint of another format is a folder"
            )
        self._check_version()
        tensors, values = (self._integer(8, 8), self._integer(16, 8))
        if values > _MOST_VALUES or tensors > _MOST_TENSORS:
            raise self._damage(
                f"it claims {values:,} values of metadata and {tensors:,} tensors, at most "
                f"{_MOST_VALUES:,} and {_MOST_TENSORS:,} are read"
            )
        self._values: dict[str, _Value] = {}
        end = self._read_values(24, values)
        self.tensors = self._read_tensors(end, tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def value(self, name: str, default: Any = None) -> Any:
        """A value as Python has it; a list of numbers is a NumPy array.

        Raises:
          ValueError: it is text that is not UTF-8.
        """
        if name not in self._values:
            return default
        kind, count, offset, end = self._values[name]
        if kind == _STRING:
            texts = self._texts(name, bytes(self._data[offset:end]))
            return texts[0] if count is None else texts
        items = np.frombuffer(self._data[offset:end], _SCALARS[kind])
        if count is not None:
            return items
        if _SCALARS[kind] == "<f4":
            return float(str(items[0]))  # 1e-6, not 9.99999997475e-07: the number that was meant
        return items[0].item()

    def integer(
        self, name: str, default: int | None = None, *, least: int = 0, most: int = 2**31 - 1
    ) -> int:
        """A whole number. A list of equal ones, which is one for each layer, counts as one.

        Raises:
          ValueError: it is missing, not a whole number, or out of range.
        """
        value = self._one(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(name, f"is not a whole number from {least:,} to {most:,}")
        return value

    def number(self, name: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite number above 0, or 0 too if `zero`.

        Raises:
          ValueError: it is missing, not a number, or out of range.
        """
        value = self._one(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "is not a number")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise self.error(name, f"is not a finite number {'from' if zero else 'above'} 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or False.

        Raises:
          ValueError: it is neither.
        """
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "is neither true nor false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A text.

        Raises:
          ValueError: it is something else.
        """
        value = self.value(name, default)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "is not text")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of texts.

        Raises:
          ValueError: it is missing, or something else.
        """
        value = self.value(name)
        if not isinstance(value, list):
            raise self.error(name, "is not a list of texts")
        return value

    def numbers(self, name: str, count: int) -> np.ndarray:
        """A list of `count` numbers.

        Raises:
          ValueError: it is missing or something else, is longer or shorter, or one is not finite.
        """
        value = self.value(name)
        if not isinstance(value, np.ndarray) or value.dtype == bool:
            raise self.error(name, "is not a list of numbers")
        if len(value) != count:
            raise ValueError(f"{self.file}: {name} has {len(value):,} items, {count:,} are needed")
        if not np.isfinite(value).all():
            at = int(np.flatnonzero(~np.isfinite(value))[0])
            raise ValueError(f"{self.file}: {name}[{at}]={value[at]} is not finite")
        return value

    def error(self, name: str, problem: str) -> ValueError:
        """An error that names the file, the value and what is wrong with it."""
        if name not in self:
            return ValueError(
                f"{self.file}: its metadata have no {name}, which is needed; convert the model anew"
            )
        value = self.value(name)
        if isinstance(value, np.ndarray):
            value = value[:100].tolist()
        return ValueError(f"{self.file}: {printable(name)}={shown(value)} {problem}")

    def _one(self, name: str, default: Any) -> Any:
        """A value; of a list of equal numbers, the first."""
        value = self.value(name, default)
        if not isinstance(value, np.ndarray):
            return value
        if not len(value) or (value != value[0]).any():
            raise self.error(name, "differs from layer to layer, which is not supported")
        return value[0].item()

    def _check_version(self) -> None:
        version = self._integer(4, 4)
        if version in (2, 3):
            return
        if int.from_bytes(self._data[4:8], "big") in (2, 3):
            raise ValueError(
                f"{self.file} is big-endian; make a copy little-endian with "
                "`gguf-convert-endian FILE little`, of the gguf library"
            )
        raise ValueError(f"{self.file} is of version {version} of GGUF, only 2 and 3 are read")

    def _read_values(self, offset: int, count: int) -> int:
        """Enters the values; the offset of their end."""
        for _ in range(count):
            name, offset = self._name(offset, "a key")
            if not name or name in self._values:
                raise self._damage(f"the key {shown(name)} is empty or stands in it twice")
            kind, items, offset = self._integer(offset, 4), None, offset + 4
            if kind == _LIST:
                kind, items = self._integer(offset, 4), self._integer(offset + 4, 8)
                offset += 12
            if kind == _STRING:
                end = self._end_of_texts(name, offset, 1 if items is None else items)
            elif kind in _SCALARS:
                size = np.dtype(_SCALARS[kind]).itemsize * (1 if items is None else items)
                end = self._end(name, offset, size)
            else:
                raise self._damage(f"{shown(name)} is of type {kind}, which the format lacks")
            if kind == 7 and max(self._data[offset:end], default=0) > 1:
                raise self._damage(f"{shown(name)} is neither true nor false")
            self._values[name] = _Value(kind, items, offset, end)
            offset = end
        return offset

    def _read_tensors(self, offset: int, count: int) -> dict[str, Tensor]:
        sizes = _block_sizes(self.file)
        rows = []
        names: set[str] = set()
        for _ in range(count):
            name, offset = self._name(offset, "a tensor's name")
            if not name or name in names:
                raise self._damage(f"the tensor {shown(name)} has no name or stands in it twice")
            names.add(name)
            dimensions = self._integer(offset, 4)
            if not 1 <= dimensions <= _MOST_DIMENSIONS:
                raise self._damage(f"the tensor {shown(name)} has {dimensions} dimensions")
            # The format lists the inner dimension first.
            shape = tuple(self._integer(offset + 4 + 8 * i, 8) for i in range(dimensions))[::-1]
            offset += 4 + 8 * dimensions
            kind, begin = self._integer(offset, 4), self._integer(offset + 4, 8)
            offset += 12
            if kind not in sizes:
                raise self._damage(
                    f"the tensor {shown(name)} is of type {kind}, which the gguf library does not "
                    "know; quantize the model anew, as Q8_0 or Q4_K"
                )
            rows.append((name, kind, shape, begin, sizes[kind]))
        alignment = self._alignment()
        start = -(-offset // alignment) * alignment
        tensors: dict[str, Tensor] = {}
        expected = end = 0
        for name, kind, shape, begin, (block, size) in rows:
            if min(shape) < 1 or shape[-1] % block:
                raise self._damage(
                    f"the tensor {shown(name)} is {_times(shape)}, in blocks of {block}"
                )
            # Tensors follow one another: one that overlaps another, or leaves a gap, is damaged.
            if begin != expected:
                raise self._damage(
                    f"the tensor {shown(name)} begins at byte {begin:,} of the data, {expected:,} "
                    "is expected"
                )
            row = shape[-1] // block * size
            tensor = Tensor(self.file, kind, shape, start + begin, row, self._map)
            end = tensor.offset + tensor.size
            if end > self._size:
                raise self._damage(
                    f"the tensor {shown(name)} ends at byte {end:,}, the file at {self._size:,}"
                )
            expected = -(-(begin + tensor.size) // alignment) * alignment
            tensors[name] = tensor
        if self._size > max(start + expected, offset + alignment):
            raise self._damage(
                f"its last tensor ends at byte {end or offset:,}, the file at {self._size:,}"
            )
        return tensors

    def _alignment(self) -> int:
        name = "general.alignment"
        alignment = self.integer(name, 32, least=1)
        if alignment & (alignment - 1):
            raise self.error(name, "is not a power of two")
        return alignment

    def _name(self, offset: int, what: str) -> tuple[str, int]:
        """A short text, and the offset of its end."""
        length = self._integer(offset, 8)
        if length > _LONGEST_NAME:
            raise self._damage(f"{what} is {length:,} bytes long")
        begin, end = offset + 8, self._end(what, offset + 8, length)
        try:
            return str(self._data[begin:end], "utf-8"), end
        except UnicodeDecodeError:
            raise self._damage(f"{what} is not UTF-8") from None

    def _integer(self, offset: int, size: int) -> int:
        """The unsigned number of `size` bytes, 4 or 8, at `offset`."""
        self._end("its header", offset, size)
        return (_LENGTH if size == 8 else _NUMBER).unpack_from(self._data, offset)[0]

    def _end(self, what: str, offset: int, size: int) -> int:
        if size > self._size - offset:
            raise self._damage(
                f"{shown(what)} needs {size:,} bytes more after byte {offset:,}, the file ends at "
                f"{self._size:,}"
            )
        return offset + size

    def _end_of_texts(self, name: str, offset: int, count: int) -> int:
        """Where `count` texts end that begin at `offset`."""
        self._end(name, offset, 8 * count)
        self._strings += count
        if self._strings > _MOST_STRINGS:
            raise self._damage(f"its metadata have more than {_MOST_STRINGS:,} texts")
        data, read, last = self._data, _LENGTH.unpack_from, self._size - 8
        for _ in range(count):
            if offset > last:
                break
            offset += 8 + read(data, offset)[0]
        else:
            if offset <= self._size:
                return offset
        raise self._damage(f"the texts of {shown(name)} go on beyond its end, {self._size:,}")

    def _texts(self, name: str, data: bytes) -> list[str]:
        """The texts in `data`, each after its length."""
        texts, offset, read = [], 0, _LENGTH.unpack_from
        while offset < len(data):
            begin = offset + 8
            offset = begin + read(data, offset)[0]
            try:
                texts.append(data[begin:offset].decode())
            except UnicodeDecodeError:
                where = name if self._values[name].items is None else f"{name}[{len(texts)}]"
                raise ValueError(
                    f"{self.file}: {where}={shown(data[begin:offset])} is not UTF-8"
                ) from None
        return texts

    def _damage(self, problem: str) -> ValueError:
        return ValueError(f"{self.file} is not GGUF, or is truncated or damaged: {problem}")


def _block_sizes(file: pathlib.Path) -> dict[int, tuple[int, int]]:
    """Numbers and bytes in a block of each type of tensor."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            f"{file} needs the gguf library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
    return {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
