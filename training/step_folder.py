"""One step of a run on disk: its arrays, and the manifest with their checksums."""

import dataclasses
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from training import manifest
from training.arrays import read_array, write_arrays
from training.manifest import Leaf, Manifest, Place
from training.run_folder import MANIFEST, PARTIAL

_ARRAYS = "arrays"
_READERS = 4  # arrays read, decompressed and summed at once


def is_saved(folder: pathlib.Path, written: Manifest) -> bool:
    """Whether `folder` holds the step of this manifest, undamaged."""
    try:
        if Manifest.read(folder) != written:
            return False
        load(folder, written.leaves)
    except (OSError, ValueError):
        return False
    return True


def write(folder: pathlib.Path, written: Manifest, arrays: dict[str, np.ndarray]) -> None:
    """Writes a whole step to `folder`, and reads it back to check it.

    Args:
      folder: is made; the folder above it must be there.
      written: the step's manifest.
      arrays: by the names that the manifest stores them under.

    Raises:
      ValueError: what is read back differs.
      Exception: OSError, or the array store's kind of error; `error_number` knows both.
    """
    folder.mkdir()
    # The store takes no empty arrays.
    write_arrays(folder / _ARRAYS, {name: array for name, array in arrays.items() if array.size})
    with (folder / MANIFEST).open("w") as file:
        file.write(written.to_json())
        file.flush()
        os.fsync(file.fileno())
    load(folder, written.leaves)


def remove(path: pathlib.Path) -> None:
    """Removes a file or a step; if that is cut short, no half of a step keeps its name."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != PARTIAL:
            whole, path = path, path.with_name(f"{path.name}.removed{PARTIAL}")
            shutil.rmtree(path, ignore_errors=True)
            whole.rename(path)
        shutil.rmtree(path)
    else:
        path.unlink()


def size_of(path: pathlib.Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def read(folder: pathlib.Path, wanted: Sequence[Place]) -> tuple[Manifest, dict[str, np.ndarray]]:
    """The manifest and the arrays by path of a step's folder; ValueError: it cannot be used."""
    try:
        saved = Manifest.read(folder)
    except OSError as error:
        raise ValueError(
            f"its {MANIFEST} cannot be read ({reason(error)}): saving was cut short, or another "
            "program wrote it"
        ) from None
    if str(saved.step) != folder.name:
        raise ValueError(f"its manifest is that of step {saved.step}")
    leaves = manifest.rename_old_leaves(saved.leaves, wanted)
    saved = dataclasses.replace(saved, leaves=tuple(leaves))
    differing = manifest.mismatches(leaves, wanted)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError("it is of another state: " + "; ".join(differing[:3]) + more)
    return saved, load(folder, saved.leaves)


def load(folder: pathlib.Path, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    """The arrays of `leaves` by path; ValueError: one is damaged, and is named."""
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(pool.map(lambda leaf: (leaf.path, _load_leaf(folder, leaf)), leaves))


def _load_leaf(folder: pathlib.Path, leaf: Leaf) -> np.ndarray:
    try:
        if 0 in leaf.shape:  # the store takes no empty arrays
            array = np.zeros(leaf.shape, jnp.dtype(leaf.dtype))
        else:
            shape, dtype = leaf.shape, leaf.dtype
            if leaf.key is not None:
                words = jax.random.key_data(jax.random.key(0, impl=leaf.key))
                shape, dtype = (*shape, *words.shape), str(words.dtype)
            array = read_array(folder / _ARRAYS, leaf.stored, shape, dtype)
    except Exception as error:  # whatever kind damage leads to
        raise ValueError(f"{leaf.path} cannot be read ({reason(error)})") from None
    if manifest.checksum(array) != leaf.sha256:
        raise ValueError(f"the checksum of {leaf.path} differs: its bytes have changed")
    return array


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    number = error_number(error)
    return os.strerror(number) if number else str(error).strip().split("\n")[0][:200]


def error_number(error: Exception) -> int | None:
    """The system's number of an error, by which a full disk is known; None: it has none."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))  # the array store's form of it
    return int(code[1]) if code else None
