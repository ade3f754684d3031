"""This file is the matrix product whose moves along one axis are hidden behind its parts.

Public per-PE functions, of tiles. S. Wang et al., "Overlap Communication with Dependent Computation
via Decomposition in Large Deep Learning Models", ASPLOS 2023: the gather before a product, or the
scatter after it, becomes a ring whose every step goes on while the part at hand is multiplied. Both
directions of the ring are used, each by half of every tile.

Along the other axis an operand is gathered, or a result summed, at once and whole: choose as
`along` the axis that leaves the smaller one to be held. X goes round along x, or Y along y; on a
wafer, whose lines have ends, in the order of a folded ring.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.matmul import allgather, tile
from wsekern.wafer.axes import COLS, ROWS


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape, along: str, ring: fabric.Ring) -> jax.Array:
    """S = X @ Y, in float32: one operand is gathered, the halves of the other go round."""
    moving = a if along == COLS else b
    held = _held(b if along == COLS else a, along, moving.shape[_meeting(along)])
    bys, halves = _halves(moving, along)

    def parts(halves, s):
        blocks = [_block(held, along, _place(along, ring, -by * s), moving) for by in bys]
        pairs = list(zip(halves, blocks, strict=True))
        pairs = pairs if along == COLS else [pair[::-1] for pair in pairs]
        return [tile.product("nn", x, y, len(shape)) for x, y in pairs]

    def step(carry, s):
        halves, sums = carry
        halves = _shifted(halves, along, bys, ring)
        return (halves, jax.tree.map(jnp.add, sums, parts(halves, s))), None

    carry = (halves, parts(halves, 0))
    (_, sums), _ = lax.scan(step, carry, jnp.arange(1, fabric.axis_size(along)))
    return jnp.concatenate(sums, _free(along))


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape, along: str, ring: fabric.Ring) -> jax.Array:
    """X = S @ Y^T, in float32: Y is gathered and sums go round, or Y goes round and X is summed."""
    part = lambda s, y: tile.product("nt", s, y, len(shape))  # noqa: E731
    if along == COLS:
        return _sums_go_round(a, _held(b, along, shape[-1]), shape, along, ring, part)
    whole = _operand_goes_round(b, a, shape, along, ring, lambda y, s: part(s, y))
    return allgather.scattered_columns(tile.sized(whole, -1, shape[-1] * fabric.axis_size(COLS)))


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, along: str, ring: fabric.Ring) -> jax.Array:
    """Y = X^T @ S, in float32: X is gathered and sums go round, or X goes round and Y is summed."""
    part = lambda x, s: tile.product("tn", x, s, len(shape))  # noqa: E731
    if along == ROWS:
        held = _held(a, along, shape[-2])
        return _sums_go_round(b, held, shape, along, ring, lambda s, x: part(x, s))
    whole = _operand_goes_round(a, b, shape, along, ring, part)
    whole = tile.sized(whole, -2, shape[-2] * fabric.axis_size(ROWS))
    return fabric.reduce_scatter(whole, ROWS, -2)


def _sums_go_round(
    stays: jax.Array,
    held: jax.Array,
    shape: tile.Shape,
    along: str,
    ring: fabric.Ring,
    part: Callable,
) -> jax.Array:
    """Each PE adds its part to the sums that pass, which reach home in the last step."""
    size = fabric.axis_size(along)
    bys, halves = _halves(stays, along)
    like = jax.ShapeDtypeStruct(shape, held.dtype)

    def parts(s):
        homes = [_place(along, ring, by * (size - 1 - s)) for by in bys]
        return [
            part(half, _block(held, along, home, like))
            for half, home in zip(halves, homes, strict=True)
        ]

    def step(sums, s):
        return jax.tree.map(jnp.add, _shifted(sums, along, bys, ring), parts(s)), None

    return jnp.concatenate(lax.scan(step, parts(0), jnp.arange(1, size))[0], _free(along))


def _operand_goes_round(
    moving: jax.Array,
    stays: jax.Array,
    shape: tile.Shape,
    along: str,
    ring: fabric.Ring,
    part: Callable,
) -> jax.Array:
    """This PE's summands of the whole result: a block of it from each tile that passes."""
    size = fabric.axis_size(along)
    bys, halves = _halves(moving, along)
    others = _halves(stays, along)[1]
    length = moving.shape[_meeting(along)]
    axis = _meeting(_across(along)) % len(shape)  # of the result, along the other axis

    def added(whole, halves, s):
        for by, half, other in zip(bys, halves, others, strict=True):
            new = part(half, other)
            at = _place(along, ring, -by * s) * length
            old = lax.dynamic_slice_in_dim(whole, at, length, axis)
            whole = lax.dynamic_update_slice_in_dim(whole, old + new, at, axis)
        return whole

    def step(carry, s):
        halves, whole = carry
        halves = _shifted(halves, along, bys, ring)
        return (halves, added(whole, halves, s)), None

    whole = tuple(length * size if d == axis else n for d, n in enumerate(shape))
    carry = (halves, added(tile.zeros(whole, moving, stays), halves, 0))
    return lax.scan(step, carry, jnp.arange(1, size))[0][1]


def _held(x: jax.Array, along: str, length: int) -> jax.Array:
    """What does not go round `along`, gathered along the other axis for as many blocks of it."""
    whole = allgather.columns(x) if along == ROWS else fabric.all_gather(x, ROWS, -2)
    return tile.sized(whole, _meeting(_across(along)), length * fabric.axis_size(along))


def _block(held, along, place, like):
    length = like.shape[_meeting(along)]
    axis = _meeting(_across(along)) % held.ndim
    return lax.dynamic_slice_in_dim(held, place * length, length, axis)


def _halves(x: jax.Array, along: str) -> tuple[list[int], list[jax.Array]]:
    """The directions, and the part of `x` that takes each; one where there is nothing to halve."""
    if x.shape[_free(along)] < 2:
        return [1], [x]
    return [1, -1], jnp.split(x, [x.shape[_free(along)] // 2], _free(along))


def _shifted(halves, along, bys, ring):
    return [fabric.shift(half, along, by, ring=ring) for half, by in zip(halves, bys, strict=True)]


def _place(along: str, ring: fabric.Ring, further: jax.Array | int) -> jax.Array:
    """The place on the line of the PE that stands `further` places on in the ring."""
    size = fabric.axis_size(along)
    place = (fabric.ring_index(along, ring) + further) % size
    if ring == "plain":
        return place
    return jnp.where(2 * place < size, 2 * place, 2 * (size - place) - 1)


def _meeting(along: str) -> int:
    """The meeting dimension of what goes round along `along`."""
    return -1 if along == COLS else -2


def _free(along: str) -> int:
    """Its other dimension, which it shares with what stays."""
    return -2 if along == COLS else -1


def _across(along: str) -> str:
    return ROWS if along == COLS else COLS
