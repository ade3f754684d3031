"""Write a step's arrays to disk and read them back, each as a zarr array of its own.

These are the files that Orbax writes through TensorStore. It is used without Orbax here: that
returns at the first error, while other arrays are still being written, so what it has written
cannot be removed yet, and its writers end in tracebacks.
"""

import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from models.checkpoints.json_file import file_size

_SPARE = 1_000_000  # bytes that a file may have besides twice those of its array


def write_arrays(folder: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes `arrays` to `folder` by name, all at once, and through to the disk.

    It returns, or raises the first error, only when nothing is being written any more.

    Raises:
      Exception: TensorStore's kind of error, such as a full disk's.
    """

    def create(name: str) -> Any:
        array = arrays[name]
        # One file an array. zstd at its fastest: float32 weights give way by a tenth.
        metadata = {"compressor": {"id": "zstd", "level": 1}, "chunks": list(array.shape)}
        spec = _spec(folder / name) | {"metadata": metadata}
        return ts.open(spec, create=True, dtype=ts.dtype(array.dtype), shape=array.shape)

    stores = dict(zip(arrays, _wait_for_all(map(create, arrays)), strict=True))
    _wait_for_all(store.write(arrays[name]) for name, store in stores.items())


def read_array(folder: pathlib.Path, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """The array that `write_arrays`, or Orbax, wrote to `folder` by `name`.

    Raises:
      ValueError: it is of another shape or dtype, or a file of it is none or is far too large.
      Exception: TensorStore's kind of error, such as for a damaged file.
    """
    _check_files(folder / name, math.prod(shape) * jnp.dtype(dtype).itemsize)
    store = ts.open(_spec(folder / name), open=True).result()
    # Compared before anything is allocated: damage may ask for any amount of memory.
    chunk = [size or 1 for size in store.chunk_layout.read_chunk.shape or ()]
    if store.shape != shape or store.dtype != ts.dtype(jnp.dtype(dtype)):
        raise ValueError(f"it is {store.dtype.name}{list(store.shape)}, not {dtype}{list(shape)}")
    if math.prod(chunk) > max(math.prod(shape), 1):
        raise ValueError(f"its chunks of {chunk} are larger than {list(shape)}")
    return np.asarray(store.read().result())


def _check_files(folder: pathlib.Path, size: int) -> None:
    """Raises ValueError for a file that TensorStore would wait for, or die of reading it whole."""
    for file in folder.rglob("*"):
        if not file.is_dir() and (found := file_size(file)) > 2 * size + _SPARE:
            raise ValueError(f"{file.name} has {found:,} bytes, for an array of {size:,}")


def _spec(path: pathlib.Path) -> dict[str, Any]:
    # TensorStore refuses paths with "..".
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": os.path.realpath(path)}}


def _wait_for_all(futures: Iterable[Any]) -> list[Any]:
    results, errors = [], []
    for future in list(futures):
        try:
            results.append(future.result())
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return results
