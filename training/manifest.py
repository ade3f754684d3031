"""The manifest of a checkpoint: every leaf of the state, with its checksum.

The array store alone returns flipped bytes as other numbers, without an error.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from models.checkpoints.json_file import file_size, parse_json
from training.run_folder import MANIFEST
from wsekern.error_line import printable

_FORMAT = 1
_MOST = 100_000_000  # bytes of a manifest; each leaf takes some 300
_RENAMED_PARTS = {"optimiser": "optimizer"}  # first part of a leaf's path: old -> new


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One array of a state as a checkpoint stores it: without padding."""

    path: str  # place in the state, such as "params/w"
    stored: str  # the array's name on disk
    shape: tuple[int, ...]
    dtype: str
    sha256: str  # of the array's bytes, in row-major order
    key: str | None = None  # for a random key: its generator's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint's step, its leaves, and the JSON values saved beside them."""

    step: int
    leaves: tuple[Leaf, ...]
    extra: dict[str, Any]

    def to_json(self) -> str:
        """The manifest as JSON, with a checksum of its own.

        Raises:
          ValueError: `extra` holds values that JSON cannot.
        """
        fields = {"format": _FORMAT, **dataclasses.asdict(self)}
        try:
            return json.dumps({**fields, "sha256": _checksum(fields)}, indent=1)
        except TypeError as error:
            raise ValueError(
                f"extra cannot be saved as JSON ({error}); use numbers, texts, lists and dicts"
            ) from None

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """The manifest in a step's folder.

        Raises:
          ValueError: it is not a regular file or is far too large, is cut short or changed, or of
            another format.
          OSError: there is none, or it cannot be read.
        """
        file = folder / MANIFEST
        if (size := file_size(file)) > _MOST:
            raise ValueError(f"its {MANIFEST} has {size:,} bytes, more than {_MOST:,}")
        return cls.from_json(file.read_text(errors="replace"))

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest that `to_json` wrote.

        Raises:
          ValueError: it is cut short or changed, or of another format.
        """
        try:
            fields = parse_json(text.encode(errors="replace"), "it")
            stated = fields.pop("sha256")
            if fields["format"] != _FORMAT:
                raise ValueError(f"its format is {fields['format']}, this program reads {_FORMAT}")
            if _checksum(fields) != stated:
                raise ValueError("its checksum does not fit")
            leaves = (Leaf(**leaf | {"shape": tuple(leaf["shape"])}) for leaf in fields["leaves"])
            return cls(step=fields["step"], leaves=tuple(leaves), extra=fields["extra"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"its manifest is damaged or foreign ({printable(str(error))})"
            ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One leaf of a state in memory: its path, and its shape without padding."""

    path: str
    leaf: Any  # an array, or a `ShapeDtypeStruct`
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the leaf without padding."""
        return math.prod(self.shape) * self.leaf.dtype.itemsize


def places(state: Any, logical_shapes: Any = None) -> list[Place]:
    """The leaves of a state, in order.

    Args:
      state: any pytree of arrays or `ShapeDtypeStruct`s.
      logical_shapes: a tree of the same structure with the leaves' shapes without padding; None:
        nothing is padded.

    Raises:
      ValueError: a logical shape is larger than its leaf's.
    """

    def place(path: Any, leaf: Any, shape: Sequence[int] | None = None) -> Place:
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "state"
        whole = np.shape(leaf)
        shape = whole if shape is None else tuple(shape)
        if len(shape) != len(whole) or any(a > b for a, b in zip(shape, whole, strict=True)):
            raise ValueError(
                f"logical_shapes: {name} is {whole}, which cannot hold {shape}; give the shape "
                "without padding"
            )
        return Place(path=name, leaf=leaf, shape=shape)

    more = () if logical_shapes is None else (logical_shapes,)
    return jax.tree.leaves(jax.tree_util.tree_map_with_path(place, state, *more))


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def checksum(array: np.ndarray) -> str:
    """SHA-256 of an array's bytes in row-major order."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return hashlib.sha256(data).hexdigest()


def rename_old_leaves(leaves: Sequence[Leaf], wanted: Sequence[Place]) -> list[Leaf]:
    """The leaves of a checkpoint under the names that the state has today.

    The part of the train state called "optimizer" was "optimiser" before version 0.2:

        optimiser/0/mu/w  ->  optimizer/0/mu/w

    A name that the state itself has stays, whatever it is.
    """
    paths = {place.path for place in wanted}

    def rename(leaf: Leaf) -> Leaf:
        part, slash, below = leaf.path.partition("/")
        renamed = f"{_RENAMED_PARTS.get(part, part)}{slash}{below}"
        unchanged = leaf.path in paths or renamed not in paths
        return leaf if unchanged else dataclasses.replace(leaf, path=renamed)

    return [rename(leaf) for leaf in leaves]


def mismatches(leaves: Sequence[Leaf], wanted: Sequence[Place]) -> list[str]:
    """A line for each difference between a checkpoint's leaves and a state's; empty if they fit."""
    have = {leaf.path: leaf for leaf in leaves}
    want = {place.path: place for place in wanted}
    lines = [f"it lacks {path}" for path in want if path not in have]
    lines += [f"{path} is not part of the state" for path in have if path not in want]
    for path in want:
        if path in have:
            shape, dtype = want[path].shape, str(want[path].leaf.dtype)
            if (have[path].shape, have[path].dtype) != (shape, dtype):
                lines.append(
                    f"{path} is {have[path].dtype}{list(have[path].shape)}, "
                    f"wanted is {dtype}{list(shape)}"
                )
    return lines


def _checksum(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
