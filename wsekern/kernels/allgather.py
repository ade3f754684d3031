"""This file is the matrix product by gathering both operands, and when gathering is worth it.

Public per-PE functions, of tiles. R. C. Agarwal, F. G. Gustavson and M. Zubair, "A high-performance
matrix-multiplication algorithm on a distributed-memory parallel computer, using overlapped
communication", 1994, gather whole blocks as here. As few collectives as there can be, at the price
of memory: a PE holds a row of `a`'s tiles and a column of `b`'s.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.axes import COLS, ROWS
from wsekern.hardware import accelerator
from wsekern.kernels import tile_product as tile
from wsekern.wafer import Wafer

# Emulated devices: a 2048 x 2048 product on 4x4 gathers as much and is faster for it, on 2x4 it
# gathers half as much again and is slower (benchmarks/RESULTS.md).
_EMULATED_BYTES = 8 * 2**20
_MEMORY_SHARE = 64  # of an accelerator's memory, a part that leaves room for the model
_SRAM_SHARE = 4  # of a PE's SRAM, whose code takes half


def fits(gathered_bytes: int, wafer: Wafer) -> bool:
    """Whether gathering `gathered_bytes` on each PE is better than to pass them on tile by tile."""
    if wafer.machine is not None:
        return gathered_bytes <= wafer.machine.sram_bytes // _SRAM_SHARE
    chip = accelerator(wafer.grid.devices.flat[0].device_kind)
    allowed = _EMULATED_BYTES if chip is None else chip.memory_bytes // _MEMORY_SHARE
    return gathered_bytes <= allowed


def forward(
    a: Float[Array, "*batch Mt Kt"], b: Float[Array, "... Kb Nt"]
) -> Float[Array, "*batch Mt Nt"]:
    """This PE's tile of `a @ b`, in float32: two gathers and one product."""
    a, b = _alike(fabric.all_gather(a, COLS, -1), fabric.all_gather(b, ROWS, -2))
    return tile.product(a, b)


def backward(
    a: Float[Array, "*batch Mt Kt"],
    b: Float[Array, "... Kb Nt"],
    dc: Float[Array, "*batch Mt Nt"],
) -> tuple[Float[Array, "*batch Mt Kt"], Float[Array, "... Kb Nt"]]:
    """This PE's tiles of `dc @ b^T` and `a^T @ dc`, in float32.

    Two gathers, two products, and two sums of which a PE keeps its own part.
    """
    of_a, of_b = a.shape[-1] * fabric.axis_size(COLS), b.shape[-2] * fabric.axis_size(ROWS)
    b_whole = fabric.all_gather(b, ROWS, -2)
    da = _sized(tile.left_gradient(dc, b_whole), -1, of_a)
    a_whole = fabric.all_gather(a, COLS, -1)
    db = _sized(tile.right_gradient(a_whole, dc, b.ndim), -2, of_b)
    return fabric.reduce_scatter(da, COLS, -1), fabric.reduce_scatter(db, ROWS, -2)


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Each is padded with zeros for its own side of the grid: what one has more meets nothing.
    K = min(a.shape[-1], b.shape[-2])
    return _sized(a, -1, K), _sized(b, -2, K)


def _sized(x: jax.Array, axis: int, length: int) -> jax.Array:
    axis %= x.ndim
    if x.shape[axis] >= length:
        return jax.lax.slice_in_dim(x, 0, length, axis=axis)
    return jnp.pad(x, [(0, length - n if d == axis else 0) for d, n in enumerate(x.shape)])
