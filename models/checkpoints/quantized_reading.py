"""Read weights of a checkpoint as integers, straight from a GGUF file's blocks or by rounding.

At most one layer's weight is in memory as floats, or a few rows of a table.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from models.checkpoints.gguf_blocks import KINDS, BlockKind, join, read_blocks
from models.checkpoints.slots import Piece
from models.checkpoints.tensors import Tensors
from models.quantization import Quantization, in_order, is_table, stack_parts
from models.quantized import Parts

_ROWS = 4096  # of a table that are read at once
_ALIGNED = 64  # bytes: XLA's CPU backend takes over a NumPy array so aligned without a copy


def read_parts(
    pieces: list[Piece], axes: tuple[Any, ...], tensors: Tensors, quantization: Quantization
) -> Parts | None:
    """The arrays of one parameter; None if the file stores it as floats, and "stored" is wanted.

    Args:
      pieces: the parameter's, of each layer.
      axes: the names of its dimensions.
      tensors: of the checkpoint.
      quantization: how it is kept.
    """
    kinds = [_kind(piece, tensors) for piece in pieces]
    blocks = [KINDS[kind] for kind in kinds if kind in KINDS]
    exactly = len(blocks) == len(kinds) and (
        quantization.weights == "stored"
        or (quantization.weights == "int4" and not is_table(axes) and join(blocks).bits == 4)
    )
    if quantization.weights == "stored" and None in kinds:
        return None
    if is_table(axes):
        (piece,) = pieces
        return _fill_rows(piece.shape, axes, _table(piece, axes, tensors, quantization, exactly))
    kept = join(blocks) if exactly else None
    layers = (_layer(piece, axes, tensors, quantization, kept) for piece in pieces)
    return _fill(layers, len(pieces))


def _kind(piece: Piece, tensors: Tensors) -> int | None:
    """The number of the type of blocks that store a piece; -1 for several, None for floats."""
    kind_of = getattr(tensors, "block_kind", None)
    if kind_of is None:
        return None
    if piece.slot.interleaved:
        return -1
    kinds = {kind_of(name) for name in piece.names()}
    return kinds.pop() if len(kinds) == 1 else -1


def _table(
    piece: Piece,
    axes: tuple[Any, ...],
    tensors: Any,
    quantization: Quantization,
    exactly: bool,
) -> Iterator[tuple[slice, Parts]]:
    """The rows of a table, some at a time."""
    count = piece.shape[0] if in_order(axes) else piece.shape[1]
    for start in range(0, count, _ROWS):
        rows = slice(start, min(start + _ROWS, count))
        if exactly:
            kind = KINDS[tensors.block_kind(piece.name)]
            kept = BlockKind(bits=8, minima=kind.minima)
            yield rows, read_blocks(tensors.rows(piece.name, rows), kind, kept)
            continue
        index = (rows, slice(0, piece.shape[1]))
        if not in_order(axes):
            index = (slice(0, piece.shape[0]), rows)
        floats = _floats(piece, index, tensors)
        yield rows, quantization.round(floats if in_order(axes) else floats.T, True)


def _layer(
    piece: Piece,
    axes: tuple[Any, ...],
    tensors: Any,
    quantization: Quantization,
    kept: BlockKind | None,
) -> Parts:
    """The arrays of one layer's weight."""
    if kept is None:
        floats = _floats(piece, tuple(slice(0, n) for n in piece.shape), tensors)
        weight = floats if in_order(axes) else floats.swapaxes(-1, -2)
        return quantization.round(weight, False)
    outputs = piece.shape[-1 if in_order(axes) else -2]
    taken = slice(piece.begin, piece.begin + outputs)
    of_names = [
        _transpose(read_blocks(tensors.rows(name, taken), KINDS[tensors.block_kind(name)], kept))
        for name in piece.names()
    ]
    if not piece.experts:
        return of_names[0]
    return stack_parts(of_names)


def _transpose(parts: Parts) -> Parts:
    """Arrays of rows, one for each output, as those of a weight `[in, out]`."""
    values, scales, minima = parts
    return Parts(values.transpose(1, 2, 0), scales.T, None if minima is None else minima.T)


def _floats(piece: Piece, index: tuple[slice, ...], tensors: Tensors) -> np.ndarray:
    floats = np.empty(tuple(i.stop - i.start for i in index), np.float32)
    piece.read_into(floats, tensors, index)
    return floats


def _fill(layers: Iterator[Parts], count: int) -> Parts:
    """The arrays of `count` layers, each copied to its place as soon as it is read."""
    arrays: list[np.ndarray | None] = []
    for i, parts in enumerate(layers):
        if not arrays:
            arrays = [
                None if a is None else aligned_empty((count, *a.shape), a.dtype) for a in parts
            ]
        _copy(arrays, parts, i)
    return Parts(*arrays)  # type: ignore[arg-type]


def _fill_rows(
    shape: tuple[int, ...], axes: tuple[Any, ...], chunks: Iterator[tuple[slice, Parts]]
) -> Parts:
    count = shape[0] if in_order(axes) else shape[1]
    arrays: list[np.ndarray | None] = []
    for rows, parts in chunks:
        if not arrays:
            arrays = [
                None if a is None else aligned_empty((count, *a.shape[1:]), a.dtype) for a in parts
            ]
        _copy(arrays, parts, rows)
    return Parts(*arrays)  # type: ignore[arg-type]


def _copy(arrays: list[np.ndarray | None], parts: Parts, index: int | slice) -> None:
    for array, part in zip(arrays, parts, strict=True):
        if array is not None:
            array[index] = part


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array without values, aligned so that XLA's CPU backend takes it over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNED, np.uint8)
    start = -raw.ctypes.data % _ALIGNED
    return raw[start : start + size].view(dtype).reshape(shape)
