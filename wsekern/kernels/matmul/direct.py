"""Matrix product in which every tile comes straight from its owner, before it is needed.

In step s PE (y, x) of p x p multiplies the tiles number y + x + s, modulo p, of its row and column.
That is the order of Cannon's algorithm (see `cannon`), in which every tile is needed once a step.
But no tile is handed from neighbor to neighbor. So no move waits for another one, and the tiles of
later steps travel while those at hand are multiplied, along both axes at once. On few chips it is
worth it: a tile then has a short way from wherever it is.

In `a @ b^T` and `a^T @ b` one factor is first reflected in the grid's diagonal. Both factors then
lie as those of `a @ b` do, and no sums move.
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Float, Num

from wsekern import fabric
from wsekern.kernels.matmul import tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer.axes import COLS, ROWS

_STEP_SECONDS = 0.5e-6  # of one more product and two more moves on a TPU, beside their own time
_ON_THEIR_WAY = 3  # steps whose tiles XLA's TPU compiler lets travel at a time


def price(problem: MatmulProblem) -> PricedPlan:
    """(p - 1) (X + Y) words in 2 p moves that do not wait for one another; holds three of each."""
    plan = MatmulPlan(name="direct", algorithm=Direct())
    wafer, p = problem.wafer, problem.wafer.height
    if wafer.backend != "devices":
        return PricedPlan(plan=plan, refused="is for devices; mesh_gemm has shorter ways")
    if p != wafer.width:
        refused = f"needs a square grid, it is {p}x{wafer.width}"
        return PricedPlan(plan=plan, refused=refused)
    a, b = {
        "nn": (problem.x, problem.y),
        "nt": (problem.s, problem.y),
        "tn": (problem.x, problem.s),
    }[problem.form]
    reflected = {"nn": 0, "nt": b, "tn": a}[problem.form]
    return problem.price(
        plan,
        words=((p - 1) * (a + b) + reflected) / WORD_BYTES,
        steps=2 * p + bool(reflected),
        hops=p * p,
        held_bytes=_ON_THEIR_WAY * (a + b) + reflected,
        seconds=_seconds(problem, max(a, b), reflected),
    )


def _seconds(problem: MatmulProblem, tile_bytes: int, reflected: int) -> float | None:
    p, rate = problem.wafer.height, problem.link_bytes_per_second
    arithmetic = problem.arithmetic_seconds
    if rate is None or arithmetic is None:
        return None
    first = tile_bytes / rate
    # Half of a line sends all its tiles to the other half, over the link in the middle.
    moves = p * p // 4 * tile_bytes / rate
    busy = max(first + arithmetic, moves + arithmetic / p)
    return busy + reflected / rate + p * _STEP_SECONDS


@dataclasses.dataclass(frozen=True)
class Direct:
    """p products; the tiles of each come from their owners, in one move each."""

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y."""
        return _multiply("nn", x, y, result)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: PE (y, x) needs row x of Y's tiles; the reflection makes it column x."""
        return _multiply("nt", s, fabric.transpose(y), result)

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: PE (y, x) needs column y of X's tiles; the reflection makes it row y."""
        return _multiply("tn", fabric.transpose(x), s, result)


def _multiply(
    form: tile.Form, a: Num[Array, "... _ _"], b: Num[Array, "... _ _"], result: TileResult
) -> Float[Array, "... _ _"]:
    """The sum of p products, of the tiles of `a` in this PE's row and of `b` in its column."""
    # XLA lets moves begin as early as it likes only where it sees them all: so no loop.
    pairs = []
    for step in range(fabric.axis_size(ROWS)):
        left = fabric.skew(a, COLS, ROWS, times=-1, plus=-step)
        pairs.append((left, fabric.skew(b, ROWS, COLS, times=-1, plus=-step)))
    total = tile.product(form, *pairs[0], result)
    for pair in pairs[1:]:
        # Without the barrier XLA would keep every product, and add them all at last. The product is
        # the left summand: then its own loop adds, on a TPU; on the right, a pass over memory does.
        total = lax.optimization_barrier(tile.product(form, *pair, result) + total)
    return total
