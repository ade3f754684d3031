"""This file is the matrix product by Cannon's algorithm: tiles travel round the grid, uncopied.

Public per-PE functions, of tiles. L. E. Cannon, "A Cellular Computer to Implement the Kalman Filter
Algorithm", 1969. On the folded ring it is MeshGEMM of C. He et al., "WaferLLM: Large Language Model
Inference at Wafer Scale", OSDI 2025: no tile ever goes further than two hops a step.

On a rectangle the meeting dimension is cut into lcm(height, width) blocks: a PE holds some of X and
some of Y, and in a step one block of each goes on to the neighbor.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from wsekern import fabric
from wsekern.kernels.matmul import tile
from wsekern.wafer.axes import COLS, ROWS


def serves(height: int, width: int) -> bool:
    """Whether the blocks of a `height` x `width` grid are few enough to be worth their steps."""
    return math.lcm(height, width) <= 2 * max(height, width)


def nn(a: jax.Array, b: jax.Array, shape: tile.Shape, ring: fabric.Ring) -> jax.Array:
    """S = X @ Y, in float32: X travels along x and Y along y, and S stays.

    There are L = lcm(height, width) products and L - 1 shifts of a block of either operand after
    the skews. A PE holds two tiles of each operand at a time, one of them on its way.
    """
    x, y = _departed(a, COLS, ring), _departed(b, ROWS, ring)

    def step(carry, _):
        x, y, c = carry
        x, y = _turned(x, COLS, 1, ring), _turned(y, ROWS, 1, ring)
        return (x, y, c + tile.product("nn", x[0], y[0], len(shape))), None

    carry = (x, y, tile.product("nn", x[0], y[0], len(shape)))
    return lax.scan(step, carry, length=_blocks() - 1)[0][2]


def nt(a: jax.Array, b: jax.Array, shape: tile.Shape, ring: fabric.Ring) -> jax.Array:
    """X = S @ Y^T, in float32: Y travels along y, the sums along x, and come home at last."""
    return _collected("nt", a, b, len(shape), ring)


def tn(a: jax.Array, b: jax.Array, shape: tile.Shape, ring: fabric.Ring) -> jax.Array:
    """Y = X^T @ S, in float32: X travels along x, the sums along y, and come home at last."""
    return _collected("tn", a, b, len(shape), ring)


def _collected(form, a, b, ndim, ring):
    there, back = (ROWS, COLS) if form == "nt" else (COLS, ROWS)
    moving = _departed(b if form == "nt" else a, there, ring)

    def part(moving):
        pair = (a, moving[0]) if form == "nt" else (moving[0], b)
        return tile.product(form, *pair, ndim)[None]

    def step(carry, _):
        moving, sums = carry
        moving, sums = _turned(moving, there, 1, ring), _turned(sums, back, 1, ring)
        return (moving, jnp.concatenate([sums[:1] + part(moving), sums[1:]])), None

    first = part(moving)
    others = jnp.repeat(jnp.zeros_like(first), _slots(back) - 1, 0)
    carry = (moving, jnp.concatenate([first, others]))
    (_, sums), _ = lax.scan(step, carry, length=_blocks() - 1)
    return _home(sums, back, ring)


def _blocks() -> int:
    return math.lcm(fabric.axis_size(ROWS), fabric.axis_size(COLS))


def _slots(along: str) -> int:
    """How many blocks of what travels along `along` a PE holds."""
    return _blocks() // fabric.axis_size(along)


def _across(along: str) -> str:
    return ROWS if along == COLS else COLS


def _axis(along: str) -> int:
    return -1 if along == COLS else -2


def _departed(tile_, along, ring):
    """Its blocks, [slots, ...], where the first product needs them.

    The first block of PE (y, x) is then number x L / width + y L / height, of X and of Y alike; so
    it is after every turn of both. Places are those in the ring.
    """
    slots, axis = _slots(along), _axis(along)
    if _apart(ring):
        tile_ = fabric.route(tile_, along, list(enumerate(_folded(along))))
    axis %= tile_.ndim
    cut = jnp.reshape(tile_, (*tile_.shape[:axis], slots, -1, *tile_.shape[axis + 1 :]))
    return _skewed(jnp.moveaxis(cut, axis, 0), along, 1, 0, ring)


def _home(blocks, along, ring):
    """The tile of the blocks that have been turned L - 1 times since they would have departed."""
    blocks = _skewed(blocks, along, -1, 1, ring)
    axis = _axis(along) % (blocks.ndim - 1)
    cut = jnp.moveaxis(blocks, 0, axis)
    x = jnp.reshape(cut, (*cut.shape[:axis], -1, *cut.shape[axis + 2 :]))
    if _apart(ring):
        x = fabric.route(x, along, [(place, i) for i, place in enumerate(_folded(along))])
    return x


def _skewed(blocks, along, sign, plus, ring):
    """Blocks turned by `plus` and `sign` times as many as the PE's own place across is worth."""
    across = _across(along)
    times = sign * _slots(across)
    if _slots(along) == 1:
        return fabric.skew(blocks, along, across, times=-times, plus=-plus, ring=ring)
    amount = (times * fabric.ring_index(across, ring) + plus) % _blocks()
    for bit in range((_blocks() - 1).bit_length()):
        moves = (amount >> bit) % 2 == 1
        blocks = jnp.where(moves, _turned(blocks, along, 2**bit, ring), blocks)
    return blocks


def _turned(blocks, along, by, ring):
    """Block i + `by` of the ring where block i was."""
    near, inside = divmod(by, _slots(along))
    kept = fabric.shift(blocks[inside:], along, -near, ring=ring) if near else blocks[inside:]
    if not inside:
        return kept
    return jnp.concatenate([kept, fabric.shift(blocks[:inside], along, -near - 1, ring=ring)])


def _apart(ring: fabric.Ring) -> bool:
    # Folded rows and columns of one length put the same block at the same place; of two lengths
    # they do not, and what travels is first laid out in the order of its ring.
    return ring == "folded" and fabric.axis_size(ROWS) != fabric.axis_size(COLS)


def _folded(along: str) -> list[int]:
    return fabric.ring_order(fabric.axis_size(along), "folded")
