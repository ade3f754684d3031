"""This file is the moves from PE to PE, and where a PE stands among the others.

Costs are per PE: words received, and steps that wait for one another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.fabric import across_devices, jax_collectives
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.context import inside, is_differentiating

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

Along = str | tuple[str, ...]
# In which order the PEs of a line stand in a ring: 0 1 2 3 4 5, whose ends are a whole line apart,
# or 0 2 4 5 3 1, in which no two neighbors are more than two hops apart.
Ring = Literal["plain", "folded"]
_LISTED = 4096  # PEs of a grid up to which one permutation may name each of them


class Resolved(str):
    """What a mesh itself calls an axis: no wafer in force gives it another meaning."""


def axis_size(along: Along) -> int:
    """How many PEs stand along `along` (a tuple: their product)."""
    return math.prod(jax_collectives.size(name) for name in names_of(along))


def axis_index(along: Along) -> jax.Array:
    """This PE's place along `along`, int32 (a tuple: row-major, the first axis outermost)."""
    index = jnp.int32(0)
    for name in names_of(along):
        index = index * jax_collectives.size(name) + jax_collectives.index(name)
    return index


def ring_index(along: str, ring: Ring = "plain") -> jax.Array:
    """This PE's place in the ring along `along`, int32."""
    index = axis_index(along)
    if ring == "plain":
        return index
    return jnp.where(index % 2 == 0, index // 2, axis_size(along) - (index + 1) // 2)


def shift(
    x: Any,
    along: str,
    by: int = 1,
    *,
    periodic: bool = True,
    fill: float = 0.0,
    ring: Ring = "plain",
) -> Any:
    """Every PE's `x` moved `by` places along `along`, toward higher indices if positive.

    All words of the tile are sent, once, in one step.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      by: how far; any integer.
      periodic: whether what leaves at one edge enters at the other.
      fill: what enters at an open edge.
      ring: the order of the PEs; "folded" is for periodic shifts.
    """
    size, order = axis_size(along), ring_order(axis_size(along), ring)
    if periodic:
        return _permuted(x, along, [(order[i], order[(i + by) % size]) for i in range(size)], fill)
    pairs = [(order[i], order[i + by]) for i in range(size) if 0 <= i + by < size]
    return _permuted(x, along, pairs, fill)


def skew(
    x: Any, along: str, by: str, *, times: int = 1, plus: int = 0, ring: Ring = "plain"
) -> Any:
    """Every PE's `x` moved round the ring along `along`, each row or column by another amount.

    The amount is `times` the PE's own place along `by`, and `plus`. All words of the tile are sent,
    in one step; on virtual PEs, and beyond 4,096 of them, in one for each binary digit of the
    amount.

    Args:
      x: a tile, or a pytree of tiles.
      along: the axis to move along.
      by: the other axis, whose index says how far.
      times: places moved for each place along `by`; any integer.
      plus: places moved by all alike; any integer.
      ring: the order of the PEs along both axes.
    """
    size, others = axis_size(along), axis_size(by)
    if not names_of(by):
        return shift(x, along, plus, ring=ring)
    if not names_of(along):
        return x
    if is_virtual() or size * others > _LISTED:
        amount = (times * ring_index(by, ring) + plus) % size
        for bit in range((size - 1).bit_length()):
            moved = shift(x, along, 2**bit, ring=ring)
            moves = (amount >> bit) % 2 == 1
            x = jax.tree.map(lambda new, old, m=moves: jnp.where(m, new, old), moved, x)
        return x
    return _skewed_at_once(x, along, by, times, plus, ring)


def route(x: Any, along: str, pairs: Sequence[tuple[int, int]], *, fill: float = 0.0) -> Any:
    """`x` sent from PE to PE along `along` as `pairs` of (source, destination) say.

    All words of the tile are sent, once, in one step. A PE that is no destination holds `fill`.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      pairs: each place at most once as source and at most once as destination.
      fill: what a PE gets to which nothing is sent.

    Raises:
      ValueError: a place is outside the grid or stands twice on one side.
    """
    size = axis_size(along)
    for side, places in zip(("source", "destination"), zip(*pairs, strict=True), strict=False):
        if len(set(places)) < len(places) or not all(0 <= place < size for place in places):
            raise ValueError(
                f"fabric.route: the {side}s {list(places)} must be different places from 0 to "
                f"{size - 1} along {along!r}"
            )
    return _permuted(x, along, list(pairs), fill)


def transpose(x: Any, rows: str = ROWS, cols: str = COLS) -> Any:
    """The tile of PE (x, y), on PE (y, x): the grid reflected in its diagonal, tiles as they are.

    All words of the tile are sent, in one step; on virtual PEs, and beyond 4,096 of them, in three
    skews and a reversal.

    Args:
      x: a tile, or a pytree of tiles.
      rows: one axis.
      cols: the other.

    Raises:
      ValueError: the grid is not square.
    """
    size = axis_size(rows)
    if size != axis_size(cols):
        raise ValueError(
            f"fabric.transpose: the grid is {size}x{axis_size(cols)}, it must be square; "
            "move tiles with all_to_all instead"
        )
    if size == 1:
        return x
    if not is_virtual() and size * size <= _LISTED:
        return _permuted_at_once(x, rows, cols, lambda y, x: (x, y))
    # (y, x) -> (y, x + y) -> (-x, x + y) -> (-x, y) -> (x, y), modulo the side of the grid.
    x = skew(x, cols, rows)
    x = skew(x, rows, cols, times=-1)
    x = skew(x, cols, rows)
    return route(x, rows, [(i, -i % size) for i in range(size)])


def varying(x: Any, along: Along | None = None) -> Any:
    """`x`, typed as one that may differ from PE to PE, as a fresh carry of a scan has to be.

    Args:
      x: a tile, or a pytree of tiles.
      along: the axes; by default all of the wafer.
    """
    names = names_of(_all_axes() if along is None else along)
    return jax.tree.map(lambda tile: _vary(jnp.asarray(tile), names), x)


def _vary(tile: jax.Array, names: tuple[str, ...]) -> jax.Array:
    for name in names:
        if is_virtual():
            # No cast exists under vmap; a select by this PE's place makes the tile batched.
            tile = jnp.where(lax.axis_index(name) >= 0, tile, jnp.zeros_like(tile))
            continue
        try:
            tile = lax.pcast(tile, (name,), to="varying")
        except ValueError:
            pass  # it varies along this axis already, which no public call tells
    return tile


def ring_order(size: int, ring: Ring) -> list[int]:
    """The place on the line of each place in the ring."""
    if ring == "plain":
        return list(range(size))
    return [*range(0, size, 2), *reversed(range(1, size, 2))]


def _skewed_at_once(x: Any, along: str, by: str, times: int, plus: int, ring: Ring) -> Any:
    size, others = axis_size(along), axis_size(by)
    order, rows = ring_order(size, ring), ring_order(others, ring)

    def moved(row: int, place: int) -> tuple[int, int]:
        amount = times * rows.index(row) + plus
        return row, order[(order.index(place) + amount) % size]

    return _permuted_at_once(x, by, along, moved)


def _permuted_at_once(
    x: Any, first: str, second: str, moved: Callable[[int, int], tuple[int, int]]
) -> Any:
    """`x` of every PE sent to `moved` of its places along two axes, as one move."""
    # JAX numbers the PEs of several axes in the order of the mesh, however they are named here.
    mesh = jax.sharding.get_abstract_mesh().axis_names
    names = tuple(sorted((*names_of(first), *names_of(second)), key=mesh.index))
    rows, cols = axis_size(first), axis_size(second)
    row, col = (cols, 1) if names[1] in names_of(second) else (1, rows)
    pairs = []
    for i in range(rows):
        for j in range(cols):
            to = moved(i, j)
            pairs.append((i * row + j * col, to[0] * row + to[1] * col))
    both = (first, second)
    return jax.tree.map(lambda t: lax.ppermute(varying(t, both), names, pairs), x)


def _permuted(x: Any, along: str, pairs: list[tuple[int, int]], fill: float) -> Any:
    names = names_of(along)
    if not names:
        stays = (0, 0) in pairs
        return x if stays else jax.tree.map(lambda t: jnp.full_like(t, fill), x)
    (name,) = names
    if jax_collectives.spread_axis(name):
        move = across_devices.permute_inside_vjp if is_differentiating() else across_devices.permute
        return jax.tree.map(lambda t: move(t, name, tuple(pairs), fill), x)
    size = lax.axis_size(name)
    receives = sorted(destination for _, destination in pairs)
    # A permutation under vmap must be complete: the rest is paired off, then masked.
    if is_virtual() and len(pairs) < size:
        senders, hearers = {source for source, _ in pairs}, set(receives)
        idle = [i for i in range(size) if i not in senders]
        deaf = [i for i in range(size) if i not in hearers]
        pairs = [*pairs, *zip(idle, deaf, strict=True)]
        masked = True
    else:
        masked = len(pairs) < size and fill != 0
    moved = jax.tree.map(lambda t: lax.ppermute(t, name, pairs), x)
    if not masked:
        return moved
    got = jnp.zeros(size, jnp.bool_).at[jnp.array(receives, jnp.int32)].set(True)
    here = got[lax.axis_index(name)]
    return jax.tree.map(lambda t: jnp.where(here, t, jnp.asarray(fill, t.dtype)), moved)


def _all_axes() -> tuple[str, ...]:
    wafer = inside()
    if wafer is not None:
        return wafer.axes
    return jax_collectives.device_axes()


def names_of(along: Along) -> tuple[Resolved, ...]:
    """What the mesh at hand calls the axes `along`, without those that it lacks."""
    axes = (along,) if isinstance(along, str) else along
    wafer = inside()
    if wafer is None:
        here = tuple(
            a
            for a in axes
            if a != WAFERS or isinstance(a, Resolved) or a in jax_collectives.device_axes()
        )
    else:
        here = tuple(a if isinstance(a, Resolved) else _own(wafer, a) or "" for a in axes)
    return tuple(Resolved(name) for name in here if name)


def _own(wafer: Wafer, axis: str) -> str | None:
    """None for the wafer axis of a single wafer; a mesh's own name stands for itself."""
    name = wafer.axis_name(axis)
    if name is not None or axis == WAFERS:
        return name
    if axis in {name for _, name in wafer.names}:
        return axis
    raise ValueError(f"fabric: {axis!r} is not an axis of the wafer, which has {wafer.axes}")
