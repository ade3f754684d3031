"""Matrix product by Cannon's algorithm: tiles travel round the grid, and none is copied.

L. E. Cannon, "A Cellular Computer to Implement the Kalman Filter Algorithm", 1969. On a ring folded
onto the line it is MeshGEMM of C. He et al., "WaferLLM: Large Language Model Inference at Wafer
Scale", OSDI 2025: no tile ever goes further than two hops a step.

On a rectangle the meeting dimension is cut into L = lcm(height, width) blocks. A PE holds L / width
blocks of X and L / height of Y, and in each step one block of either goes on to the neighbor. On a
2 x 4 grid a tile of X is one block and a tile of Y two:

    step 0   PE (0, 0) has x0 and y0 y1, and multiplies x0 y0
    step 1   x1 arrives from the east and y2 from the south: x1 and y1 y2, x1 y1
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, Shaped

from wsekern import fabric
from wsekern.kernels.matmul import tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer.axes import COLS, ROWS


def price_cannon(problem: MatmulProblem) -> PricedPlan:
    """p (X + Y) words in 2 p steps on p x p PEs; a wrap is as long as the grid."""
    furthest = max(problem.wafer.height, problem.wafer.width) - 1
    return _price(problem, "cannon", "plain", hops=furthest)


def price_mesh_gemm(problem: MatmulProblem) -> PricedPlan:
    """As many words and steps, of two hops each; on rectangles two moves more."""
    return _price(problem, "mesh_gemm", "folded", hops=2)


def _price(problem: MatmulProblem, name: str, ring: fabric.Ring, hops: int) -> PricedPlan:
    h, w = problem.wafer.height, problem.wafer.width
    blocks = math.lcm(h, w)
    plan = MatmulPlan(name=name, algorithm=Cannon(ring=ring), unit=blocks)
    if blocks > 2 * max(h, w):  # more steps than they are worth
        return PricedPlan(
            plan=plan,
            refused=f"needs a grid that is square or whose sides' least common multiple is at most "
            f"twice the longer, it is {h}x{w}",
        )
    (tiles_x, steps_x), (tiles_y, steps_y) = (_price_skew(blocks // n, blocks) for n in (w, h))
    if (
        ring == "folded" and h != w
    ):  # see `_needs_reordering`; each is laid out in the order of its ring, in one move
        tiles_x, steps_x, tiles_y, steps_y = tiles_x + 1, steps_x + 1, tiles_y + 1, steps_y + 1
    shifted = (blocks - 1) * (problem.x * w + problem.y * h) / blocks
    return problem.price(
        plan,
        words=(shifted + tiles_x * problem.x + tiles_y * problem.y) / WORD_BYTES,
        steps=2 * (blocks - 1) + steps_x + steps_y,
        hops=(blocks - 1) * hops + (steps_x + steps_y) * max(h, w),
        held_bytes=2 * (problem.x + problem.y),
    )


def _price_skew(slots: int, blocks: int) -> tuple[float, int]:
    """Tiles and steps of a skew: one move, or by binary digits if a PE holds several blocks."""
    if slots == 1:
        return 1, 1
    # The same digits as in `_skew`: whole PEs, and slots inside one.
    turns = [divmod(2**bit, slots) for bit in range((blocks - 1).bit_length())]
    tiles = sum((slots if pes else inside) / slots for pes, inside in turns)
    return tiles, sum(bool(pes) + bool(inside) for pes, inside in turns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cannon:
    """L products, and L - 1 shifts of a block of either operand after the skews.

    A PE holds two tiles of each operand at a time, one of them on its way.
    """

    ring: fabric.Ring

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: X travels along x and Y along y, and S stays."""
        ring = self.ring
        xs, ys = _skewed_blocks(x, COLS, ring), _skewed_blocks(y, ROWS, ring)

        def step(carry: tuple, _: None) -> tuple[tuple, None]:
            xs, ys, total = carry
            xs, ys = _turn(xs, COLS, 1, ring), _turn(ys, ROWS, 1, ring)
            return (xs, ys, total + tile.product("nn", xs[0], ys[0], result)), None

        # The first product needs no turn, and gives the sum its shape, dtype and varying axes.
        first = (xs, ys, tile.product("nn", xs[0], ys[0], result))
        return lax.scan(step, first, length=_blocks() - 1)[0][2]

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: Y travels along y, the sums along x, and the sums return at last."""
        return _with_traveling_sums("nt", s, y, result, self.ring)

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: X travels along x, the sums along y, and the sums return at last."""
        return _with_traveling_sums("tn", x, s, result, self.ring)


def _with_traveling_sums(
    form: tile.Form,
    a: Num[Array, "... _ _"],
    b: Num[Array, "... _ _"],
    result: TileResult,
    ring: fabric.Ring,
) -> Float[Array, "... _ _"]:
    along, along_sums = (ROWS, COLS) if form == "nt" else (COLS, ROWS)
    moving = _skewed_blocks(b if form == "nt" else a, along, ring)

    def summand(moving: Num[Array, "slots ..."]) -> Float[Array, "1 ..."]:
        pair = (a, moving[0]) if form == "nt" else (moving[0], b)
        return tile.product(form, *pair, result)[None]

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        moving, sums = carry
        moving, sums = _turn(moving, along, 1, ring), _turn(sums, along_sums, 1, ring)
        return (moving, jnp.concatenate([sums[:1] + summand(moving), sums[1:]])), None

    # A PE holds as many blocks of sums as its tile of the result has. In each step it adds to the
    # first block; the next turn sends that one on, and the others move up.
    first = summand(moving)
    others = jnp.repeat(jnp.zeros_like(first), _slots(along_sums) - 1, 0)
    carry = (moving, jnp.concatenate([first, others]))
    (_, sums), _ = lax.scan(step, carry, length=_blocks() - 1)
    return _tile_of_blocks(sums, along_sums, ring)


def _blocks() -> int:
    return math.lcm(fabric.axis_size(ROWS), fabric.axis_size(COLS))


def _slots(along: str) -> int:
    """How many blocks a PE holds of what travels along `along`."""
    return _blocks() // fabric.axis_size(along)


def _across(along: str) -> str:
    return ROWS if along == COLS else COLS


def _meeting_axis(along: str) -> int:
    return -1 if along == COLS else -2


def _skewed_blocks(x: Num[Array, "..."], along: str, ring: fabric.Ring) -> Num[Array, "slots ..."]:
    """The tile's blocks, each where the first product needs it.

    The first block of PE (y, x) is then number x L / width + y L / height of both X and Y, so that
    the two fit, and fit again after every turn of both. Places are counted in the ring.
    """
    slots, axis = _slots(along), _meeting_axis(along)
    if _needs_reordering(ring):
        x = fabric.route(x, along, list(enumerate(_folded_places(along))))
    axis %= x.ndim
    split = jnp.reshape(x, (*x.shape[:axis], slots, -1, *x.shape[axis + 1 :]))
    return _skew(jnp.moveaxis(split, axis, 0), along, 1, 0, ring)


def _tile_of_blocks(
    blocks: Num[Array, "slots ..."], along: str, ring: fabric.Ring
) -> Num[Array, "..."]:
    """The inverse of `_skewed_blocks`, for blocks that have been turned L - 1 times since."""
    blocks = _skew(blocks, along, -1, 1, ring)
    axis = _meeting_axis(along) % (blocks.ndim - 1)
    split = jnp.moveaxis(blocks, 0, axis)
    x = jnp.reshape(split, (*split.shape[:axis], -1, *split.shape[axis + 2 :]))
    if _needs_reordering(ring):
        x = fabric.route(x, along, [(place, i) for i, place in enumerate(_folded_places(along))])
    return x


def _skew(
    blocks: Shaped[Array, "slots ..."], along: str, sign: int, plus: int, ring: fabric.Ring
) -> Shaped[Array, "slots ..."]:
    """Blocks turned by `plus` + `sign` * n, where n blocks lie before this PE along the other axis.

    Every row (or column) of PEs turns by another number, so a PE that holds several blocks takes
    the binary digits of its number one by one: of 5 = 4 + 1, a turn by 1 and a turn by 4.
    """
    across = _across(along)
    times = sign * _slots(across)
    if _slots(along) == 1:
        return fabric.skew(blocks, along, across, times=-times, plus=-plus, ring=ring)
    amount = (times * fabric.ring_index(across, ring) + plus) % _blocks()
    for bit in range((_blocks() - 1).bit_length()):
        has_digit = (amount >> bit) % 2 == 1
        blocks = jnp.where(has_digit, _turn(blocks, along, 2**bit, ring), blocks)
    return blocks


def _turn(
    blocks: Shaped[Array, "slots ..."], along: str, by: int, ring: fabric.Ring
) -> Shaped[Array, "slots ..."]:
    """Block i + `by` of the ring where block i was."""
    # Of slots 0 1 2, turned by 1, a PE keeps 1 2 and receives the next PE's 0. Turned by 4 it
    # receives 1 2 of the next PE and 0 of the one after that.
    pes, inside = divmod(by, _slots(along))
    kept = fabric.shift(blocks[inside:], along, -pes, ring=ring) if pes else blocks[inside:]
    if not inside:
        return kept
    return jnp.concatenate([kept, fabric.shift(blocks[:inside], along, -pes - 1, ring=ring)])


def _needs_reordering(ring: fabric.Ring) -> bool:
    # If rows and columns are equally long, folding puts the same block at the same place in both.
    # On a rectangle it does not, and what travels is first laid out in the order of its ring.
    return ring == "folded" and fabric.axis_size(ROWS) != fabric.axis_size(COLS)


def _folded_places(along: str) -> list[int]:
    return fabric.ring_order(fabric.axis_size(along), "folded")
