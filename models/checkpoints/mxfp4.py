"""Decode MXFP4, four-bit floats with one scale for every 32: the experts of gpt-oss.

"OCP Microscaling Formats (MX) Specification", version 1.0, 2023. A value is one of sixteen numbers
times a power of two, which bfloat16 holds exactly.
"""

import ml_dtypes
import numpy as np

from models.checkpoints.tensors import Tensors

_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_HALVES, *(-value for value in _HALVES)], np.float32)
_BIAS = 127


class Mxfp4:
    """The arrays of a checkpoint, each pair `X_blocks` and `X_scales` decoded to an array `X`.

    Blocks are `[E, out, in/32, 16]`, two values a byte, the even one in the low half. Scales are
    `[E, out, in/32]`. The decoded array is `[E, in, out]`, as in checkpoints without MXFP4.
    """

    def __init__(self, tensors: Tensors) -> None:
        """The arrays of `tensors`.

        Raises:
          ValueError: blocks are not bytes, have no scales of their shape, or stand beside the array
            that they decode to.
        """
        self._inner = tensors
        self.shapes, self.dtypes = dict(tensors.shapes), dict(tensors.dtypes)
        for name in tensors.shapes:
            if not name.endswith("_blocks"):
                continue
            whole = name.removesuffix("_blocks")
            scales = f"{whole}_scales"
            shape = self.shapes.pop(name)
            if whole in self.shapes:
                raise ValueError(
                    f"{tensors.where(name)}: {name!r} and {whole!r} are the same array"
                )
            bytes_ = all(tensors.dtypes.get(part) == np.uint8 for part in (name, scales))
            of_scales = self.shapes.pop(scales, None)
            if not bytes_ or of_scales != shape[:-1] or len(shape) != 4 or shape[3] != 16:
                raise ValueError(
                    f"{tensors.where(name)}: {name!r} is {tensors.dtypes[name]}{shape}; it must be "
                    f"uint8 [E, out, in/32, 16] and have {scales!r} of [E, out, in/32]"
                )
            experts, out, groups, _ = shape
            self.shapes[whole] = (experts, groups * 32, out)
            self.dtypes[whole] = np.dtype(ml_dtypes.bfloat16)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of an array; decodes only the groups of 32 that the part touches."""
        if name in self._inner.shapes:
            return self._inner.read(name, index)
        experts, rows, columns = index
        first, last, step = rows.indices(self.shapes[name][1])
        groups = slice(first // 32, -(-last // 32))
        blocks = self._inner.read(f"{name}_blocks", (experts, columns, groups, slice(None)))
        scales = self._inner.read(f"{name}_scales", (experts, columns, groups))
        decoded = decode(blocks, scales)
        shift = groups.start * 32
        return decoded[:, :, first - shift : last - shift : step].swapaxes(1, 2)

    def forget(self) -> None:
        """Gives the pages of the files that were read back to the system."""
        self._inner.forget()

    def where(self, name: str) -> str:
        """The file that holds an array."""
        return self._inner.where(name if name in self._inner.shapes else f"{name}_blocks")


def decode(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The bfloat16 values `[..., G * 32]` of blocks `[..., G, 16]` and scales `[..., G]`."""
    values = np.empty((*blocks.shape, 2), np.float32)
    values[..., 0] = _VALUES[blocks & 15]
    values[..., 1] = _VALUES[blocks >> 4]
    values = np.ldexp(values.reshape(*scales.shape, 32), scales.astype(np.int32)[..., None] - _BIAS)
    return values.reshape(*scales.shape[:-1], -1).astype(ml_dtypes.bfloat16)
