"""This file is where each piece of a decoder's state stands in a checkpoint, both ways.

A piece is one parameter of one layer. The state holds the layers of a stage stacked; a checkpoint
holds a tensor for each, or for several parameters that share an input, or for each expert.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from models.checkpoints.names import Names, Slot
from models.checkpoints.tensors import Tensors
from models.config import DecoderConfig
from models.presets import FAMILIES
from sharding.state import named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One parameter of one layer, or one outside the layers."""

    leaf: str  # the path in the state
    turn: int | None  # which of the stacked layers; None outside the layers
    name: str  # of the tensor in the checkpoint; "{expert}" still stands for a number
    slot: Slot
    turned: bool  # whether the checkpoint has the last two dimensions the other way round
    shape: tuple[int, ...]  # of the piece, as the state holds it
    parts: int = 1  # how many parameters the tensor holds along its last dimension
    begin: int = 0  # where this one begins there, if they stand one after another
    width: int = 0  # the size of that dimension

    @property
    def experts(self) -> bool:
        """Whether each expert is a tensor of its own."""
        return "{expert}" in self.name

    def names(self) -> Iterator[str]:
        """The tensors that the piece is made of."""
        for expert in range(self.shape[0] if self.experts else 1):
            yield self.name.replace("{expert}", str(expert))

    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of these tensors."""
        shape = self.shape[1:] if self.experts else self.shape
        if self.turned:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return (*shape[:-1], self.width) if self.parts > 1 else shape

    def tensor_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where the part `index` of the piece (of one expert) stands in its tensor."""
        if self.parts > 1:
            step = self.parts if self.slot.interleaved else 1
            columns = index[-1]
            first, last = columns.start * step + self.begin, columns.stop * step + self.begin
            index = (*index[:-1], slice(first, min(last, self.width), step))
        return (*index[:-2], index[-1], index[-2]) if self.turned else index

    def read_into(self, out: np.ndarray, tensors: Tensors, index: tuple[slice, ...]) -> None:
        """Fills `out` with the part `index` of the piece."""
        if not self.experts:
            _copy(out, self._turned(tensors.read(self.name, self.tensor_index(index))))
            return
        for i, expert in enumerate(range(index[0].start, index[0].stop)):
            name = self.name.replace("{expert}", str(expert))
            _copy(out[i], self._turned(tensors.read(name, self.tensor_index(index[1:]))))

    def _turned(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2) if self.turned else array

    def place(self, tensor: np.ndarray, value: np.ndarray) -> None:
        """Puts the piece (of one expert) where it stands in its tensor."""
        whole = tuple(slice(0, n) for n in value.shape)
        tensor[self.tensor_index(whole)] = self._turned(value)


def pieces(config: DecoderConfig, state: Any, prefix: str) -> dict[str, list[Piece]]:
    """The pieces of each leaf of a decoder's state, in the order in which they are stacked.

    Args:
      config: of the decoder.
      state: its parameters, or their shapes.
      prefix: what the names of all but the head begin with.
    """
    names: Names = FAMILIES[config.family].NAMES
    leaves = named_leaves(state)
    numbers = {place: layer for layer, place in enumerate(config.places())}
    found = {}
    for path, leaf in leaves.items():
        axes = leaf.get_metadata()["axes"]
        shape = tuple(leaf.get_metadata().get("logical_shape", leaf.shape))
        if not path.startswith("stages/"):
            slot = names.head if path == "head" else names.top[path]
            name = slot.name if path == "head" else prefix + slot.name
            found[path] = [_piece(path, None, name, slot, axes, shape, {})]
            continue
        _, stage, _, position, inner = path.split("/", 4)
        slot = names.block[inner]
        root = path.removesuffix(inner)
        widths = {
            other: logical_width(leaves[root + other])
            for other in (slot.part[1] if slot.part else ())
        }
        found[path] = [
            _piece(
                path,
                turn,
                f"{prefix}{names.layers}.{numbers[int(stage), int(position), turn]}.{slot.name}",
                slot,
                axes[1:],
                shape[1:],
                widths,
            )
            for turn in range(shape[0])
        ]
    return found


def logical_width(leaf: Any) -> int:
    """The last dimension of a leaf, without padding."""
    return tuple(leaf.get_metadata().get("logical_shape", leaf.shape))[-1]


def _piece(path, turn, name, slot, axes, shape, widths) -> Piece:
    order = {"in": "in_out", "feature": "in_out", "vocab": "out_in", "out": "out_in"}
    turned = slot.order != "same" and order[axes[-2]] != slot.order
    more: dict[str, Any] = {}
    if slot.part is not None:
        which, others = slot.part
        sizes = [widths[other] for other in others]
        more = {
            "parts": len(sizes),
            "begin": which if slot.interleaved else sum(sizes[:which]),
            "width": sum(sizes),
        }
    return Piece(leaf=path, turn=turn, name=name, slot=slot, turned=turned, shape=shape, **more)


def _copy(out: np.ndarray, array: np.ndarray) -> None:
    """`out[...] = array`, cast; bfloat16 is widened by its bits: numpy's own cast is slow."""
    if array.dtype.name == "bfloat16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[...] = array.view(np.uint16)
        bits <<= 16
    else:
        out[...] = array


def bytes_of(state: Any) -> int:
    """How many bytes the arrays of a state have in all."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
