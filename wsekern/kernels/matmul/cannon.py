"""Matrix product by Cannon's algorithm: tiles travel round the grid, and none is copied.

L. E. Cannon, "A Cellular Computer to Implement the Kalman Filter Algorithm", 1969. On a ring folded
onto the line it is MeshGEMM of C. He et al., "WaferLLM: Large Language Model Inference at Wafer
Scale", OSDI 2025: no tile ever goes further than two hops a step.

On a rectangle the meeting dimension is cut into L = lcm(height, width) blocks. A PE holds L / width
blocks of X and L / height of Y, and in each step one block of either goes on to the neighbor. On a
2 x 4 grid a tile of X is one block and a tile of Y two:

    step 0   PE (0, 0) has x0 and y0 y1, and multiplies x0 y0
    step 1   x1 arrives from the east and y2 from the south: x1 and y1 y2, x1 y1

On TPUs and GPUs the tiles of a step travel while those of the step before are multiplied. On a
square of them `a @ b^T` and `a^T @ b` send no sums: one factor is reflected in the grid's diagonal.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, Shaped

from wsekern import fabric
from wsekern.kernels.matmul import steps, tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer.axes import COLS, ROWS

_STEP_SECONDS = 0.5e-6  # of one more product and two more moves on a TPU, beside their own time


def price_cannon(problem: MatmulProblem) -> PricedPlan:
    """p (X + Y) words in 2 p steps on p x p PEs; a wrap is as long as the grid."""
    furthest = max(problem.wafer.height, problem.wafer.width) - 1
    return _price(problem, "cannon", "plain", hops=furthest)


def price_mesh_gemm(problem: MatmulProblem) -> PricedPlan:
    """As many words and steps, of two hops each; on rectangles two moves more."""
    return _price(problem, "mesh_gemm", "folded", hops=2)


def _price(problem: MatmulProblem, name: str, ring: fabric.Ring, hops: int) -> PricedPlan:
    h, w = problem.wafer.height, problem.wafer.width
    blocks, ahead = math.lcm(h, w), problem.on_accelerators
    reflects = ahead and h == w
    algorithm = Cannon(ring=ring, ahead=ahead, reflects=reflects)
    plan = MatmulPlan(name=name, algorithm=algorithm, unit=blocks)
    if blocks > 2 * max(h, w):  # more steps than they are worth
        return PricedPlan(
            plan=plan,
            refused=f"needs a grid that is square or whose sides' least common multiple is at most "
            f"twice the longer, it is {h}x{w}",
        )
    a, b, reflected = problem.x, problem.y, 0
    if reflects:
        a, b, reflected = problem.reflected_bytes
    (tiles_a, steps_a), (tiles_b, steps_b) = (_price_skew(blocks // n, blocks) for n in (w, h))
    # See `_needs_reordering`; each is laid out in the order of its ring, in one move.
    if ring == "folded" and h != w:
        tiles_a, steps_a, tiles_b, steps_b = tiles_a + 1, steps_a + 1, tiles_b + 1, steps_b + 1
    shifted = (blocks - 1) * (a * w + b * h) / blocks
    return problem.price(
        plan,
        words=(shifted + tiles_a * a + tiles_b * b + reflected) / WORD_BYTES,
        steps=2 * (blocks - 1) + steps_a + steps_b + bool(reflected),
        hops=(blocks - 1) * hops + (steps_a + steps_b) * max(h, w),
        held_bytes=2 * (a + b),
        seconds=_seconds(problem, max(a, b), reflected) if reflects else None,
    )


def _seconds(problem: MatmulProblem, tile_bytes: int, reflected: int) -> float | None:
    """On a square of accelerators, whose tiles travel along both axes at once."""
    p, rate = problem.wafer.height, problem.link_bytes_per_second
    arithmetic = problem.arithmetic_seconds
    if rate is None or arithmetic is None:
        return None
    # Nothing hides the skew, and the last product hides nothing.
    move, product = tile_bytes / rate, arithmetic / p
    busy = move + (p - 1) * max(move, product) + product
    return busy + reflected / rate + p * _STEP_SECONDS


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
    ahead: bool = False  # tiles travel while others are multiplied
    reflects: bool = False  # one factor of `a @ b^T` and `a^T @ b`, so that no sums move

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: X travels along x and Y along y, and S stays."""
        pair = _skewed_blocks(x, COLS, self.ring), _skewed_blocks(y, ROWS, self.ring)
        return steps.fold(pair, *self._turn_and_add("nn", result), **self._options)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: Y travels along y, the sums along x, and the sums return at last."""
        if self.reflects:
            y = fabric.transpose(y, skewed=ROWS, ring=self.ring)
            pair = _skewed_blocks(s, COLS, self.ring), y[None]
            return steps.fold(pair, *self._turn_and_add("nt", result), **self._options)
        return self._send_sums("nt", s, y, result)

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: X travels along x, the sums along y, and the sums return at last."""
        if self.reflects:
            x = fabric.transpose(x, skewed=COLS, ring=self.ring)
            pair = x[None], _skewed_blocks(s, ROWS, self.ring)
            return steps.fold(pair, *self._turn_and_add("tn", result), **self._options)
        return self._send_sums("tn", x, s, result)

    def _turn_and_add(
        self, form: tile.Form, result: TileResult
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """How skewed factors travel, along x and along y, and what is done with each pair."""

        def turn(pair: tuple, _: steps.Number) -> tuple:
            a, b = pair
            return _turn(a, COLS, 1, self.ring), _turn(b, ROWS, 1, self.ring)

        def add(total: Float[Array, "... _ _"] | None, pair: tuple, _: steps.Number) -> Any:
            product = tile.product(form, pair[0][0], pair[1][0], result)
            # The product is the left summand: then its own loop adds, on a TPU; on the right, a
            # pass over memory does.
            return product if total is None else product + total

        return turn, add

    @property
    def _options(self) -> dict[str, Any]:
        return {"steps": _blocks(), "ahead": self.ahead}

    def _send_sums(
        self,
        form: tile.Form,
        a: Num[Array, "... _ _"],
        b: Num[Array, "... _ _"],
        result: TileResult,
    ) -> Float[Array, "... _ _"]:
        """The product of two factors of which one travels, as the sums do."""
        along, along_sums = (ROWS, COLS) if form == "nt" else (COLS, ROWS)
        ring = self.ring
        moving = _skewed_blocks(b if form == "nt" else a, along, ring)

        def summand(moving: Num[Array, "slots ..."]) -> Float[Array, "1 ..."]:
            pair = (a, moving[0]) if form == "nt" else (moving[0], b)
            return tile.product(form, *pair, result)[None]

        def turn(moving: Num[Array, "slots ..."], _: steps.Number) -> Num[Array, "slots ..."]:
            return _turn(moving, along, 1, ring)

        def add(
            sums: Float[Array, "_ ..."] | None, moving: Num[Array, "slots ..."], _: steps.Number
        ) -> Any:
            if sums is None:
                first = summand(moving)
                others = jnp.repeat(jnp.zeros_like(first), _slots(along_sums) - 1, 0)
                return jnp.concatenate([first, others])
            # A PE holds as many blocks of sums as its tile of the result has. In each step it adds
            # to the first block; the next turn sends that one on, and the others move up.
            sums = _turn(sums, along_sums, 1, ring)
            return jnp.concatenate([sums[:1] + summand(moving), sums[1:]])

        sums = steps.fold(moving, turn, add, **self._options)
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
