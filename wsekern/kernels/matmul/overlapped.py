"""Matrix product that hides its moves along one axis behind partial products.

S. Wang et al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep
Learning Models", ASPLOS 2023: the gather before a product, or the scatter after it, becomes a ring,
and each of its steps goes on while the tile at hand is multiplied. Half of every tile goes round
one way and half the other, so both directions of the links are used.

Along the other axis an operand is gathered, or a result summed, at once and whole; `price` chooses
the axis that leaves the smaller one to be held. X goes round along x, or Y along y. A wafer's lines
have ends, so there the ring is folded.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from wsekern import fabric
from wsekern.kernels.matmul import allgather, steps, tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS, ROWS

Halves = list[Num[Array, "... _ _"]]  # of a tile; one whole tile if it is too small to halve
Multiply = Callable[[Num[Array, "... _ _"], Num[Array, "... _ _"]], Float[Array, "... _ _"]]


def price(problem: MatmulProblem) -> PricedPlan:
    """As many words as `allgather`, and 2 w - 1 steps along x (2 h - 1 along y)."""
    h, w = problem.wafer.height, problem.wafer.width
    x, y = problem.x, problem.y
    along = COLS if h * y <= w * x else ROWS
    size, moving, gathered = (w, x, h * y) if along == COLS else (h, y, w * x)
    ring: fabric.Ring = "plain" if problem.wafer.machine is None else "folded"
    return problem.price(
        MatmulPlan(
            name="collective",
            algorithm=Overlapped(along=along, ring=ring, ahead=problem.on_accelerators),
        ),
        words=((w - 1) * x + (h - 1) * y) / WORD_BYTES,
        steps=2 * size - 1,
        hops=h + w + 2 * size,
        held_bytes=gathered + 2 * moving,
        note=f"round along {along}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlapped:
    """Tiles go round along one axis, in halves, while others are multiplied."""

    along: str
    ring: fabric.Ring
    ahead: bool = False  # the halves of the next step travel while these are multiplied

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: one operand is gathered, the halves of the other go round."""
        along, ring = self.along, self.ring
        moving, stays = (x, y) if along == COLS else (y, x)
        gathered = _gather(stays, along, moving.shape[_meeting(along)])
        directions, halves = _halve(moving, along)

        def add(sums: Halves | None, halves: Halves, i: steps.Number) -> Halves:
            blocks = [
                _block(gathered, along, _place(along, ring, -direction * i), moving)
                for direction in directions
            ]
            pairs = zip(halves, blocks, strict=True)
            if along == ROWS:
                pairs = zip(blocks, halves, strict=True)
            products = []
            for pair in pairs:
                products.append(tile.product("nn", *pair, result))
            return products if sums is None else jax.tree.map(jnp.add, products, sums)

        sums = steps.fold(halves, self._turn(directions), add, **self._options)
        return jnp.concatenate(sums, _free(along))

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: Y is gathered and sums go round, or Y goes round and X is summed."""
        if self.along == COLS:
            gathered = _gather(y, COLS, result.shape[-1])
            multiply = functools.partial(tile.product, "nt", result=result)
            return self._send_sums(s, gathered, result.shape, multiply)

        def multiply_swapped(
            y: Num[Array, "... _ _"], s: Num[Array, "... _ _"]
        ) -> Float[Array, "... _ _"]:
            return tile.product("nt", s, y, result)

        summands = self._send_operand(y, s, result.shape, multiply_swapped)
        width = result.shape[-1] * fabric.axis_size(COLS)
        return allgather.reduce_scatter_columns(layout.resize(summands, -1, width))

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: X is gathered and sums go round, or X goes round and Y is summed."""
        if self.along == ROWS:
            gathered = _gather(x, ROWS, result.shape[-2])

            def multiply_swapped(
                s: Num[Array, "... _ _"], x: Num[Array, "... _ _"]
            ) -> Float[Array, "... _ _"]:
                return tile.product("tn", x, s, result)

            return self._send_sums(s, gathered, result.shape, multiply_swapped)
        multiply = functools.partial(tile.product, "tn", result=result)
        summands = self._send_operand(x, s, result.shape, multiply)
        height = result.shape[-2] * fabric.axis_size(ROWS)
        return fabric.reduce_scatter(layout.resize(summands, -2, height), ROWS, -2)

    def _turn(self, directions: list[int]) -> Callable[[Halves, steps.Number], Halves]:
        """How halves of tiles travel from one step to the next."""
        return lambda halves, _: _shift(halves, self.along, directions, self.ring)

    @property
    def _options(self) -> dict[str, Any]:
        return {"steps": fabric.axis_size(self.along), "ahead": self.ahead, "numbered": True}

    def _send_sums(
        self,
        stays: Num[Array, "... _ _"],
        gathered: Num[Array, "... _ _"],
        shape: tuple[int, ...],
        multiply: Multiply,
    ) -> Float[Array, "... _ _"]:
        """Each PE adds its summand to the sums that pass; in the last step they are at their PE."""
        along, ring, size = self.along, self.ring, fabric.axis_size(self.along)
        directions, halves = _halve(stays, along)
        like = jax.ShapeDtypeStruct(shape, gathered.dtype)  # one PE's sums

        def summands(i: Int[Array, ""] | int) -> Halves:
            # The sums that pass now have size - 1 - i steps to go.
            places = [_place(along, ring, direction * (size - 1 - i)) for direction in directions]
            return [
                multiply(half, _block(gathered, along, place, like))
                for half, place in zip(halves, places, strict=True)
            ]

        def add(sums: Halves | None, _: Halves, i: steps.Number) -> Halves:
            if sums is None:
                return summands(i)
            return jax.tree.map(jnp.add, _shift(sums, along, directions, ring), summands(i))

        return jnp.concatenate(steps.fold([], self._turn([]), add, **self._options), _free(along))

    def _send_operand(
        self,
        moving: Num[Array, "... _ _"],
        stays: Num[Array, "... _ _"],
        shape: tuple[int, ...],
        multiply: Multiply,
    ) -> Float[Array, "... _ _"]:
        """This PE's summands of the whole result: a block of it from each tile that passes."""
        along, size = self.along, fabric.axis_size(self.along)
        directions, halves = _halve(moving, along)
        _, stays_halves = _halve(stays, along)
        length = moving.shape[_meeting(along)]
        axis = _meeting(_across(along)) % len(shape)  # of the result, along the other axis

        shape = tuple(length * size if d == axis else n for d, n in enumerate(shape))

        def add(
            whole: Float[Array, "... _ _"] | None, halves: Halves, i: steps.Number
        ) -> Float[Array, "... _ _"]:
            whole = tile.zeros(shape, moving, stays) if whole is None else whole
            for direction, half, other in zip(directions, halves, stays_halves, strict=True):
                # The tile that passes began `i` places back, so its block of the result is there.
                block = multiply(half, other)
                at = _place(along, self.ring, -direction * i) * length
                old = lax.dynamic_slice_in_dim(whole, at, length, axis)
                whole = lax.dynamic_update_slice_in_dim(whole, old + block, at, axis)
            return whole

        return steps.fold(halves, self._turn(directions), add, **self._options)


def _gather(x: Num[Array, "... _ _"], along: str, length: int) -> Num[Array, "... _ _"]:
    """The operand that does not go round `along`, gathered along the other axis.

    Its meeting dimension becomes `length` for each PE along `along`, so that it can be cut into one
    block for each tile that goes round.
    """
    whole = allgather.gather_columns(x) if along == ROWS else fabric.all_gather(x, ROWS, -2)
    return layout.resize(whole, _meeting(_across(along)), length * fabric.axis_size(along))


def _block(
    gathered: Num[Array, "... _ _"],
    along: str,
    place: Int[Array, ""],
    like: Num[Array | jax.ShapeDtypeStruct, "... _ _"],
) -> Num[Array, "... _ _"]:
    length = like.shape[_meeting(along)]
    axis = _meeting(_across(along)) % gathered.ndim
    return lax.dynamic_slice_in_dim(gathered, place * length, length, axis)


def _halve(x: Num[Array, "... _ _"], along: str) -> tuple[list[int], Halves]:
    """The directions, and the part of `x` that goes in each; one of either if `x` is too small."""
    if x.shape[_free(along)] < 2:
        return [1], [x]
    return [1, -1], jnp.split(x, [x.shape[_free(along)] // 2], _free(along))


def _shift(halves: Halves, along: str, directions: list[int], ring: fabric.Ring) -> Halves:
    return [
        fabric.shift(half, along, direction, ring=ring)
        for half, direction in zip(halves, directions, strict=True)
    ]


def _place(along: str, ring: fabric.Ring, further: Int[Array, ""] | int) -> Int[Array, ""]:
    """The place on the line of the PE that is `further` places on in the ring.

    A folded ring visits even places on the way out and odd ones on the way back: 0 2 4 5 3 1.
    """
    size = fabric.axis_size(along)
    place = (fabric.ring_index(along, ring) + further) % size
    if ring == "plain":
        return place
    return jnp.where(2 * place < size, 2 * place, 2 * (size - place) - 1)


def _meeting(along: str) -> int:
    """The dimension that the product sums over, in the operand that goes round `along`."""
    return -1 if along == COLS else -2


def _free(along: str) -> int:
    """The dimension that the operand that goes round `along` shares with S."""
    return -2 if along == COLS else -1


def _across(along: str) -> str:
    return ROWS if along == COLS else COLS
