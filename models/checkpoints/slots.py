"""Map each parameter of a decoder's state to its place in a checkpoint, to read and to write.

A piece is one parameter of one layer. The state stacks the layers of a stage in one array. A
checkpoint has a tensor for each piece, or one for several parameters that share an input (GPT-2's
query, key and value), or one for each expert.
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
from sharding.state import logical_shape, named_leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """One parameter of one layer, or one outside the layers."""

    leaf: str  # its path in the state
    period: int | None  # its index in the stacked array; None outside the layers
    name: str  # of the tensor in the checkpoint; may contain "{expert}"
    slot: Slot
    transposed: bool  # whether the checkpoint swaps the last two dimensions
    shape: tuple[int, ...]  # of the piece in the state, without padding
    parts: int = 1  # how many parameters the tensor stores along its last dimension
    begin: int = 0  # the first column of this one
    width: int = 0  # columns of the tensor

    @property
    def experts(self) -> bool:
        """Whether each expert is a tensor of its own."""
        return "{expert}" in self.name

    def names(self) -> Iterator[str]:
        """The tensors that store the piece."""
        for expert in range(self.shape[0] if self.experts else 1):
            yield self.name.replace("{expert}", str(expert))

    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of these tensors."""
        shape = self.shape[1:] if self.experts else self.shape
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return (*shape[:-1], self.width) if self.parts > 1 else shape

    def tensor_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Where `index` of the piece (of one expert) is in its tensor.

        For columns 2:4 of a parameter that is number 1 of 3, each 10 wide:
          in blocks     begin=10: columns 12:14
          interleaved   begin=1: columns 7:13:3 (7 and 10)
        """
        if self.parts > 1:
            step = self.parts if self.slot.interleaved else 1
            columns = index[-1]
            first, last = columns.start * step + self.begin, columns.stop * step + self.begin
            index = (*index[:-1], slice(first, min(last, self.width), step))
        return (*index[:-2], index[-1], index[-2]) if self.transposed else index

    def read_into(self, out: np.ndarray, tensors: Tensors, index: tuple[slice, ...]) -> None:
        """Fills `out` with `index` of the piece, cast to its dtype."""
        if not self.experts:
            _copy(out, self._transpose(tensors.read(self.name, self.tensor_index(index))))
            return
        for i, expert in enumerate(range(index[0].start, index[0].stop)):
            name = self.name.replace("{expert}", str(expert))
            _copy(out[i], self._transpose(tensors.read(name, self.tensor_index(index[1:]))))

    def _transpose(self, array: np.ndarray) -> np.ndarray:
        return array.swapaxes(-1, -2) if self.transposed else array

    def place(self, tensor: np.ndarray, value: np.ndarray) -> None:
        """Writes the piece (of one expert) to its place in `tensor`."""
        whole = tuple(slice(0, n) for n in value.shape)
        tensor[self.tensor_index(whole)] = self._transpose(value)


def pieces(config: DecoderConfig, state: Any, prefix: str) -> dict[str, list[Piece]]:
    """The pieces of each leaf of a decoder's state, in the order in which they are stacked.

    Args:
      config: the decoder's.
      state: its parameters, or their shapes.
      prefix: begins the name of every tensor but the head's.
    """
    names: Names = FAMILIES[config.family].NAMES
    leaves = named_leaves(state)
    numbers = {place: layer for layer, place in enumerate(config.places())}
    result = {}
    for path, leaf in leaves.items():
        axes = leaf.get_metadata()["axes"]
        shape = logical_shape(leaf)
        if not path.startswith("stages/"):
            slot = names.head if path == "head" else names.top[path]
            name = slot.name if path == "head" else prefix + slot.name
            result[path] = [_piece(path, None, name, slot, axes, shape, {})]
            continue
        _, stage, _, position, inner = path.split("/", 4)
        slot = names.block[inner]
        root = path.removesuffix(inner)
        widths = {
            other: logical_shape(leaves[root + other])[-1]
            for other in (slot.part[1] if slot.part else ())
        }
        result[path] = [
            _piece(
                path,
                period,
                f"{prefix}{names.layers}.{numbers[int(stage), int(position), period]}.{slot.name}",
                slot,
                axes[1:],
                shape[1:],
                widths,
            )
            for period in range(shape[0])
        ]
    return result


def _piece(
    path: str,
    period: int | None,
    name: str,
    slot: Slot,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    widths: dict[str, int],
) -> Piece:
    # The order of the state's own weight, by the name of its last dimension but one.
    order = {"in": "in_out", "feature": "in_out", "vocab": "out_in", "out": "out_in"}
    transposed = slot.order != "same" and order[str(axes[-2])] != slot.order
    fused: dict[str, Any] = {}
    if slot.part is not None:
        index, paths = slot.part
        sizes = [widths[path] for path in paths]
        fused = {
            "parts": len(sizes),
            "begin": index if slot.interleaved else sum(sizes[:index]),
            "width": sum(sizes),
        }
    return Piece(
        leaf=path, period=period, name=name, slot=slot, transposed=transposed, shape=shape, **fused
    )


def _copy(out: np.ndarray, array: np.ndarray) -> None:
    """`out[...] = array`, cast to the dtype of `out`."""
    # bfloat16 is the upper half of a float32's bits. numpy's own cast goes element by element.
    if array.dtype.name == "bfloat16" and out.dtype == np.float32:
        bits = out.view(np.uint32)
        bits[...] = array.view(np.uint16)
        bits <<= 16
    else:
        out[...] = array


def bytes_of(state: Any) -> int:
    """Bytes of all arrays of a state."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(state))
