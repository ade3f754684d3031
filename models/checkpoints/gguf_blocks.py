"""The blocks of a GGUF file as integers, scales and minima; no number is rounded.

A block is 32 values along a row. Q4_0 and Q5_0 hold a scale, and integers from -8 or -16 on; Q4_1
and Q5_1 a scale, a minimum, and integers from 0 on; Q8_0 a scale and int8. `ggml-common.h` of ggml
has the structures.
"""

import dataclasses

import numpy as np

from models.quantized import GROUP, Parts

_HALF = GROUP // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockKind:
    """The layout of a block: scale, perhaps minimum, perhaps fifth bits, integers."""

    bits: int
    minima: bool

    @property
    def size(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.minima + 4 * (self.bits == 5) + (GROUP if self.bits == 8 else _HALF)


# The format's number of a type of tensor -> its blocks
KINDS = {
    2: BlockKind(bits=4, minima=False),
    3: BlockKind(bits=4, minima=True),
    6: BlockKind(bits=5, minima=False),
    7: BlockKind(bits=5, minima=True),
    8: BlockKind(bits=8, minima=False),
}


def join(kinds: list[BlockKind]) -> BlockKind:
    """A kind that holds the numbers of all `kinds`: layers of different kinds are stacked in it."""
    return BlockKind(
        bits=4 if all(kind.bits == 4 for kind in kinds) else 8,
        minima=any(kind.minima for kind in kinds),
    )


def read_blocks(rows: np.ndarray, kind: BlockKind, kept: BlockKind) -> Parts:
    """The blocks of `rows`, as a table `[V, D/32, ..]` of `kept.bits`.

    Args:
      rows: bytes, `[V, D/32 * kind.size]`.
      kind: of the blocks.
      kept: of the arrays; `join` gave it for this kind and perhaps others.
    """
    blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, kind.size)
    scales = blocks[..., :2].copy().view("<f2")[..., 0]
    minima = blocks[..., 2:4].copy().view("<f2")[..., 0] if kind.minima else None
    packed = blocks[..., -_HALF:]
    if kind.bits == 8:
        values = blocks[..., 2:].view(np.int8)
    elif kept.bits == 4:
        values = packed
    else:
        values = np.concatenate([packed & 15, packed >> 4], axis=-1)
        if kind.bits == 5:
            values |= _fifth_bits(blocks[..., -_HALF - 4 : -_HALF]) << 4
        values = values.view(np.int8)
        if not kind.minima:
            values = values - np.int8(1 << (kind.bits - 1))
    if kept.minima and minima is None:
        # In packed halves 8 means 0, which a minimum of -8 scales says too.
        minima = scales * np.float16(-8 if kept.bits == 4 else 0)
    return Parts(values, scales, minima)


def _fifth_bits(four_bytes: np.ndarray) -> np.ndarray:
    """The fifth bit of each of 32 values, from the four bytes that hold them."""
    return np.unpackbits(four_bytes, axis=-1, bitorder="little")
