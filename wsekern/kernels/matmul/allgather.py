"""Matrix product by gathering both operands: few moves, much memory.

R. C. Agarwal, F. G. Gustavson and M. Zubair, "A high-performance matrix-multiplication algorithm on
a distributed-memory parallel computer, using overlapped communication", 1994, gather whole blocks
as here. There are as few collectives as there can be, at the price of memory: a PE holds a row of
X's tiles and a column of Y's.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from wsekern import fabric
from wsekern.kernels.matmul import tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS

# XLA's CPU backend concatenates tiles along their last dimension about six times faster than it
# gathers them along it. With more tiles than this the program would grow too long. On accelerators
# the gather puts them side by side at no cost, and a concatenation is a pass over memory.
_MOST_CONCATENATED = 16


def price(problem: MatmulProblem) -> PricedPlan:
    """(w - 1) X + (h - 1) Y words in 2 steps."""
    h, w = problem.wafer.height, problem.wafer.width
    return problem.price(
        MatmulPlan(name="allgather", algorithm=AllGather()),
        words=((w - 1) * problem.x + (h - 1) * problem.y) / WORD_BYTES,
        steps=2,
        hops=h + w,
        held_bytes=problem.gathered_bytes,
        overlaps=False,  # nothing is multiplied before all is there
    )


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Gathers what a PE's tile of the result needs, or reduce-scatters what a PE has of it."""

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: two gathers and one product."""
        x, y = gather_columns(x), fabric.all_gather(y, ROWS, -2)
        # Each is padded with zeros for its own side of the grid. Where one is longer, its padding
        # would be multiplied by nothing.
        K = min(x.shape[-1], y.shape[-2])
        return tile.product("nn", layout.resize(x, -1, K), layout.resize(y, -2, K), result)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: a gather, a product and a reduce-scatter."""
        partial = tile.product("nt", s, fabric.all_gather(y, ROWS, -2), result)
        width = result.shape[-1] * fabric.axis_size(COLS)
        return reduce_scatter_columns(layout.resize(partial, -1, width))

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: a gather, a product and a reduce-scatter."""
        partial = tile.product("tn", gather_columns(x), s, result)
        height = result.shape[-2] * fabric.axis_size(ROWS)
        return fabric.reduce_scatter(layout.resize(partial, -2, height), ROWS, -2)


def gather_columns(x: Shaped[Array, "... _"]) -> Shaped[Array, "... _"]:
    """All tiles along x, concatenated along their last dimension."""
    if not _concatenates():
        return fabric.all_gather(x, COLS, -1)
    tiles = fabric.all_gather(x[None], COLS, 0)
    return jnp.concatenate([tiles[i] for i in range(fabric.axis_size(COLS))], -1)


def reduce_scatter_columns(x: Shaped[Array, "... _"]) -> Shaped[Array, "... _"]:
    """The sum of `x` along x; this PE keeps its own part of the last dimension."""
    if not _concatenates():
        return fabric.reduce_scatter(x, COLS, -1)
    parts = jnp.split(x, fabric.axis_size(COLS), -1)
    return fabric.reduce_scatter(jnp.stack(parts), COLS, 0)[0]


def _concatenates() -> bool:
    wafer = context.inside()
    on_accelerator = wafer is not None and wafer.platform in ("tpu", "gpu")
    return fabric.axis_size(COLS) <= _MOST_CONCATENATED and not on_accelerator
