"""Matrix product by SUMMA: panels of both operands are broadcast, one at a time.

R. A. van de Geijn and J. Watts, "SUMMA: Scalable Universal Matrix Multiplication Algorithm", 1997.
The grid may have any height and width. A panel is as wide as a tile along the longer side of the
grid. Along the shorter side it may lie in two tiles; each PE then sends its part of the panel, as a
flood in which the other PEs have zeros.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from wsekern import fabric
from wsekern.kernels.matmul import panels, tile
from wsekern.kernels.matmul.gathered_summa import GatheredSumma
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer.axes import COLS, ROWS

_MOST_PIECES = 64  # products of a program for TPUs; each more takes time to compile


def price(problem: MatmulProblem) -> PricedPlan:
    """w X + h Y words in 2 max(h, w) floods; a panel of each is held."""
    if problem.on_accelerators:
        return _price_gathered(problem)
    h, w = problem.wafer.height, problem.wafer.width
    steps = max(h, w)
    panel_x, panel_y = problem.x * w / steps, problem.y * h / steps
    # A panel of an operand is flooded; one of the result is summed.
    moves_x = 2 * (w - 1) / w if problem.form == "nt" else 1
    moves_y = 2 * (h - 1) / h if problem.form == "tn" else 1
    return problem.price(
        MatmulPlan(name="summa", algorithm=Summa()),
        words=steps * (moves_x * panel_x + moves_y * panel_y) / WORD_BYTES,
        steps=2 * steps,
        hops=steps * (h + w),
        held_bytes=panel_x + panel_y,
    )


def _price_gathered(problem: MatmulProblem) -> PricedPlan:
    """(w - 1) X + (h - 1) Y words; two panels of each are held."""
    h, w = problem.wafer.height, problem.wafer.width
    pieces = h == w and problem.wafer.platform == "tpu"
    # Of pieces there are `panels` times `w`, in a program without a loop.
    count = max(h, w) if not pieces else min(w, max(2, _MOST_PIECES // w))
    a, b, reflected = problem.reflected_bytes if h == w else (problem.x, problem.y, 0)
    return problem.price(
        MatmulPlan(
            name="summa",
            algorithm=GatheredSumma(panels=count, pieces=pieces),
            unit=math.lcm(h, w) * count if h != w else 1,
        ),
        words=((w - 1) * a + (h - 1) * b + reflected) / WORD_BYTES,
        steps=2 * count + bool(reflected),
        hops=count * (h + w),
        held_bytes=2 * (w * a + h * b) / count,
        note=f"{count} panels",
    )


@dataclasses.dataclass(frozen=True)
class Summa:
    """max(height, width) steps; a PE holds one panel of each operand at a time."""

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: each step broadcasts a panel of X and one of Y, and multiplies them."""
        # A tile is shorter along the longer side of the grid, whether it is of X or of Y.
        width = min(x.shape[-1], y.shape[-2])

        def summand(i: Int[Array, ""] | int) -> Float[Array, "... Mt Nt"]:
            pair = _broadcast_panel(x, -1, COLS, width, i), _broadcast_panel(y, -2, ROWS, width, i)
            return tile.product("nn", *pair, result)

        def step(
            total: Float[Array, "... Mt Nt"], i: Int[Array, ""]
        ) -> tuple[Float[Array, "... Mt Nt"], None]:
            return total + summand(i), None

        # The first product begins the sum, and gives it its dtype and varying axes.
        return lax.scan(step, summand(0), jnp.arange(1, _steps()))[0]

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: each step broadcasts a panel of Y and sums one of X."""
        width = min(result.shape[-1], y.shape[-2])

        def step(
            x: Float[Array, "... Mt Kx"], i: Int[Array, ""]
        ) -> tuple[Float[Array, "... Mt Kx"], None]:
            partial = tile.product("nt", s, _broadcast_panel(y, -2, ROWS, width, i), result)
            return _put_panel(x, fabric.all_reduce(partial, COLS), -1, COLS, i), None

        return lax.scan(step, tile.zeros(result.shape, s, y), jnp.arange(_steps()))[0]

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: each step broadcasts a panel of X and sums one of Y."""
        width = min(x.shape[-1], result.shape[-2])

        def step(
            y: Float[Array, "... Ky Nt"], i: Int[Array, ""]
        ) -> tuple[Float[Array, "... Ky Nt"], None]:
            partial = tile.product("tn", _broadcast_panel(x, -1, COLS, width, i), s, result)
            return _put_panel(y, fabric.all_reduce(partial, ROWS), -2, ROWS, i), None

        return lax.scan(step, tile.zeros(result.shape, x, s), jnp.arange(_steps()))[0]


def _steps() -> int:
    return max(fabric.axis_size(ROWS), fabric.axis_size(COLS))


def _broadcast_panel(
    x: Num[Array, "... _ _"], axis: int, along: str, width: int, i: Int[Array, ""] | int
) -> Num[Array, "... _ _"]:
    # Panel i begins `start` after this PE's tile does; before it, if negative. PEs that have no
    # part of the panel contribute zeros to the flood.
    start = i * width - fabric.axis_index(along) * x.shape[axis]
    return fabric.flood(panels.take(x, axis, start, width), along)


def _put_panel(
    x: Float[Array, "... _ _"],
    panel: Float[Array, "... _ _"],
    axis: int,
    along: str,
    i: Int[Array, ""],
) -> Float[Array, "... _ _"]:
    start = i * panel.shape[axis] - fabric.axis_index(along) * x.shape[axis]
    return panels.put(x, panel, axis, start)
