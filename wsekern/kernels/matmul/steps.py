"""Steps of a matrix product between which tiles move, with the next tiles on their way meanwhile.

Per-PE functions. On TPUs and GPUs the tiles of a step are sent before those at hand are multiplied,
so that the transfer and the product go on side by side (double buffering). On CPU devices and on
virtual PEs nothing travels while a product runs; there the next tiles would only take memory.

    ahead:      move 1 | move 2, product 1 | move 3, product 2 | product 3
    otherwise:  move 1, product 1 | move 2, product 2 | move 3, product 3
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree, Shaped

_MOST_UNROLLED = 16  # steps; a loop copies the tiles that arrive to where the next trip has them
_SMALL_BYTES = 2 * 2**20  # of the tiles of one step

Number = Int[Array, ""] | int
Tiles: TypeAlias = PyTree[Shaped[Array, "..."]]


def fold(
    tiles: Tiles,
    move: Callable[[Any, Number], Tiles],
    add: Callable[[Any, Any, Number], Tiles],
    steps: int,
    *,
    ahead: bool,
    numbered: bool = False,
    in_turn: bool = True,
) -> Any:
    """The total after `add` has used the tiles of every step.

    Args:
      tiles: of the first step.
      move: the next step's tiles, from those at hand and the next step's number.
      add: the total after a step, from the one before (None in the first step, which gives the
        total its shape, dtype and varying axes), the step's tiles and its number.
      steps: how many there are, the first among them.
      ahead: whether the tiles of a step move before those of the step before are used. It holds
        the tiles of two steps.
      numbered: whether `move` and `add` are given true numbers; else 0, and the loop has none.
      in_turn: whether the tiles of a step must have arrived before the next step begins. Else XLA
        lets those of later steps travel too, where it thinks that there is room; for small tiles
        there always is.
    """
    total = add(None, tiles, 0)
    if steps == 1:
        return total
    if not ahead:

        def step(carry: tuple, i: Number | None) -> tuple[tuple, None]:
            tiles, total = carry
            tiles = move(tiles, 0 if i is None else i)
            return (tiles, add(total, tiles, 0 if i is None else i)), None

        numbers = jnp.arange(1, steps) if numbered else None
        return lax.scan(step, (tiles, total), numbers, length=steps - 1)[0][1]

    traveling_bytes = sum(tile.size * tile.dtype.itemsize for tile in jax.tree.leaves(tiles))
    in_turn = in_turn and traveling_bytes >= _SMALL_BYTES

    def step_ahead(carry: tuple, i: Number | None) -> tuple[tuple, None]:
        tiles, total = carry
        following = move(tiles, 0 if i is None else i + 1)
        total = add(total, tiles, 0 if i is None else i)
        if in_turn:
            return lax.optimization_barrier((following, total)), None
        # Where steps are unrolled, XLA would keep every product and add them all at last.
        return (following, lax.optimization_barrier(total)), None

    numbers = jnp.arange(1, steps - 1) if numbered else None
    begin = move(tiles, 1), total
    if in_turn:  # as after each step: a barrier makes all its arrays vary along the same axes
        begin = lax.optimization_barrier(begin)
    unroll = max(1, min(steps - 2, _MOST_UNROLLED))
    (tiles, total), _ = lax.scan(step_ahead, begin, numbers, length=steps - 2, unroll=unroll)
    return add(total, tiles, steps - 1)
