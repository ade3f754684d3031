"""Moves of tiles from PE to PE, and a PE's place among the others.

Costs are per PE: words received, and steps that wait for one another.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, PyTree, Shaped

from wsekern.fabric import across_devices, jax_collectives
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.context import inside, is_differentiating

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

TileTree: TypeAlias = PyTree[Shaped[Array, "..."]]  # a tile, or a pytree of tiles
Along = str | tuple[str, ...]
# The order in which the PEs of a line form a ring. "plain" is 0 1 2 3 4 5, whose ends are a whole
# line apart; "folded" is 0 2 4 5 3 1, in which neighbors are at most two hops apart.
Ring = Literal["plain", "folded"]
_MOST_LISTED = 4096  # PEs of a grid whose permutations may list a pair for each PE


class Resolved(str):
    """A mesh's own name for an axis, which no wafer in force translates again."""


def axis_size(along: Along) -> int:
    """How many PEs stand along `along`; for a tuple of axes, the product.

    Args:
      along: one axis or several.
    """
    return math.prod(jax_collectives.size(name) for name in names_of(along))


def axis_index(along: Along) -> Int32[Array, ""]:
    """This PE's place along `along`, counted from 0.

    Args:
      along: one axis or several; PEs of several are counted in row-major order, the first axis
        outermost.
    """
    index = jnp.int32(0)
    for name in names_of(along):
        index = index * jax_collectives.size(name) + jax_collectives.index(name)
    return index


def ring_index(along: str, ring: Ring = "plain") -> Int32[Array, ""]:
    """This PE's place in the ring along `along`, counted from 0.

    Args:
      along: one axis.
      ring: the order of its PEs in the ring: "plain" or "folded" (0 2 4 5 3 1).
    """
    index = axis_index(along)
    if ring == "plain":
        return index
    return jnp.where(index % 2 == 0, index // 2, axis_size(along) - (index + 1) // 2)


def shift(
    x: TileTree,
    along: str,
    by: int = 1,
    *,
    periodic: bool = True,
    fill: float = 0.0,
    ring: Ring = "plain",
) -> TileTree:
    """Every PE's `x` moved `by` places along `along`; each PE gets the tile `by` places before it.

    Every PE receives the words of one tile, in one step.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      by: how far, toward higher indices if positive; any integer.
      periodic: whether tiles that leave at one edge enter at the other.
      fill: the value that enters at an edge if not `periodic`.
      ring: the order of the PEs: "plain", or "folded" (0 2 4 5 3 1) for periodic shifts whose
        every hop is at most two PEs long.
    """
    size, order = axis_size(along), ring_order(axis_size(along), ring)
    if periodic:
        return _permute(x, along, [(order[i], order[(i + by) % size]) for i in range(size)], fill)
    pairs = [(order[i], order[i + by]) for i in range(size) if 0 <= i + by < size]
    return _permute(x, along, pairs, fill)


def skew(
    x: TileTree, along: str, by: str, *, times: int = 1, plus: int = 0, ring: Ring = "plain"
) -> TileTree:
    """Every PE's `x` moved around the ring along `along`, by a distance of its own.

    A PE at place i along `by` moves its tile `times * i + plus` places: the skew of Cannon's
    algorithm. Every PE receives the words of one tile, in one step. On virtual PEs, and on grids of
    more than 4,096 PEs, it takes one such step for each binary digit of the axis's length.

    Args:
      x: a tile, or a pytree of tiles.
      along: the axis to move along.
      by: the other axis, which sets the distance.
      times: places moved for each place along `by`; any integer.
      plus: places that every PE moves beside that; any integer.
      ring: the order of the PEs along both axes: "plain" or "folded" (0 2 4 5 3 1).
    """
    size, others = axis_size(along), axis_size(by)
    if not names_of(by):
        return shift(x, along, plus, ring=ring)
    if not names_of(along):
        return x
    if is_virtual() or size * others > _MOST_LISTED:
        # By 1, 2, 4, ... places; a PE keeps what it has where its distance has a zero. A distance
        # of 5 is a move by 1 and one by 4.
        distance = (times * ring_index(by, ring) + plus) % size
        for bit in range((size - 1).bit_length()):
            moved = shift(x, along, 2**bit, ring=ring)
            takes = (distance >> bit) % 2 == 1
            x = jax.tree.map(lambda new, old, t=takes: jnp.where(t, new, old), moved, x)
        return x
    return _skew_at_once(x, along, by, times, plus, ring)


def route(
    x: TileTree, along: str, pairs: Sequence[tuple[int, int]], *, fill: float = 0.0
) -> TileTree:
    """`x` sent along `along` from the source to the destination of each of `pairs`.

    A destination receives the words of one tile, in one step.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      pairs: (source, destination) places; a place is at most once a source, and at most once a
        destination.
      fill: the value on every PE that is no destination.

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
    return _permute(x, along, list(pairs), fill)


def transpose(
    x: TileTree,
    rows: str = ROWS,
    cols: str = COLS,
    *,
    skewed: str | None = None,
    ring: Ring = "plain",
) -> TileTree:
    """PE (y, x) gets the tile of PE (x, y): the grid is reflected in its diagonal, no tile is.

    Every PE receives the words of one tile, in one step. On virtual PEs, and on grids of more than
    4,096 PEs, it takes three skews and a reversal instead.

    Args:
      x: a tile, or a pytree of tiles.
      rows: one axis.
      cols: the other.
      skewed: the axis along which what is reflected is skewed too, in the same step, as by
        `skew(..., times=-1)`: with `rows`, PE (y, x) gets the tile of PE (x, y + x).
      ring: the order of the PEs in that skew: "plain" or "folded" (0 2 4 5 3 1).

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
    if not is_virtual() and size * size <= _MOST_LISTED:
        order = ring_order(size, ring)

        def turn_back(place: int, by: int) -> int:
            return order[(order.index(place) - order.index(by)) % size]

        def destination(col: int, row: int) -> tuple[int, int]:
            if skewed is None:
                return row, col
            return (turn_back(row, col), col) if skewed == rows else (row, turn_back(col, row))

        return _permute_at_once(x, rows, cols, destination)
    # (y, x) -> (y, x + y) -> (-x, x + y) -> (-x, y) -> (x, y), modulo the side of the grid.
    x = skew(x, cols, rows)
    x = skew(x, rows, cols, times=-1)
    x = skew(x, cols, rows)
    x = route(x, rows, [(i, -i % size) for i in range(size)])
    if skewed is None:
        return x
    return skew(x, skewed, cols if skewed == rows else rows, times=-1, ring=ring)


def varying(x: TileTree, along: Along | None = None) -> TileTree:
    """`x`, with the type of an array that may differ from PE to PE.

    JAX types a fresh array, such as `jnp.zeros`, as the same on every PE. As the first carry of a
    scan whose body makes it differ, it needs this type. No data moves.

    Args:
      x: a tile, or a pytree of tiles.
      along: the axes along which it may differ; by default all of the wafer.
    """
    names = names_of(_all_axes() if along is None else along)
    return jax.tree.map(lambda tile: _vary(jnp.asarray(tile), names), x)


def _vary(tile: Shaped[Array, "..."], names: tuple[str, ...]) -> Shaped[Array, "..."]:
    for name in names:
        if is_virtual():
            # vmap has no such cast. A select by this PE's place makes the tile batched.
            tile = jnp.where(lax.axis_index(name) >= 0, tile, jnp.zeros_like(tile))
            continue
        try:
            tile = lax.pcast(tile, (name,), to="varying")
        except ValueError:
            pass  # it varies along this axis already; no public call says so in advance
    return tile


def ring_order(size: int, ring: Ring) -> list[int]:
    """The place on the line of each place in a ring of `size` PEs.

    Args:
      size: PEs of the ring.
      ring: "plain" for 0 1 2 3 4 5 of six, "folded" for 0 2 4 5 3 1.
    """
    if ring == "plain":
        return list(range(size))
    return [*range(0, size, 2), *reversed(range(1, size, 2))]


def _skew_at_once(x: TileTree, along: str, by: str, times: int, plus: int, ring: Ring) -> TileTree:
    size, others = axis_size(along), axis_size(by)
    order, other_order = ring_order(size, ring), ring_order(others, ring)

    def destination(other: int, place: int) -> tuple[int, int]:
        distance = times * other_order.index(other) + plus
        return other, order[(order.index(place) + distance) % size]

    return _permute_at_once(x, by, along, destination)


def _permute_at_once(
    x: TileTree, first: str, second: str, destination: Callable[[int, int], tuple[int, int]]
) -> TileTree:
    """Every PE's `x` sent to `destination` of its places along two axes, as one permutation."""
    # JAX numbers the PEs of several axes in the order of the mesh, in whatever order the axes are
    # given. So sort them that way, and find how far apart the numbers of neighbors are.
    mesh = jax.sharding.get_abstract_mesh().axis_names
    names = tuple(sorted((*names_of(first), *names_of(second)), key=mesh.index))
    rows, cols = axis_size(first), axis_size(second)
    row_step, col_step = (cols, 1) if names[1] in names_of(second) else (1, rows)
    pairs = []
    for i in range(rows):
        for j in range(cols):
            to = destination(i, j)
            pairs.append((i * row_step + j * col_step, to[0] * row_step + to[1] * col_step))
    both = (first, second)
    return jax.tree.map(lambda t: lax.ppermute(varying(t, both), names, pairs), x)


def _permute(x: TileTree, along: str, pairs: list[tuple[int, int]], fill: float) -> TileTree:
    names = names_of(along)
    if not names:
        stays = (0, 0) in pairs
        return x if stays else jax.tree.map(lambda t: jnp.full_like(t, fill), x)
    (name,) = names
    if jax_collectives.spread_axis(name):
        inside_vjp = is_differentiating()
        move = across_devices.permute_inside_vjp if inside_vjp else across_devices.permute
        return jax.tree.map(lambda t: move(t, name, tuple(pairs), fill), x)
    size = lax.axis_size(name)
    receivers = sorted(destination for _, destination in pairs)
    # Under vmap a permutation must be complete. PEs that do not send are paired with PEs that do
    # not receive, and what these get is masked:
    #   (0, 1) (1, 2) of three, and (2, 0) beside them, whose tile becomes `fill`
    if is_virtual() and len(pairs) < size:
        senders = {source for source, _ in pairs}
        idle_senders = [i for i in range(size) if i not in senders]
        idle_receivers = [i for i in range(size) if i not in set(receivers)]
        pairs = [*pairs, *zip(idle_senders, idle_receivers, strict=True)]
        masked = True
    else:
        masked = len(pairs) < size and fill != 0  # ppermute itself fills with zeros
    moved = jax.tree.map(lambda t: lax.ppermute(t, name, pairs), x)
    if not masked:
        return moved
    by_place = jnp.zeros(size, jnp.bool_).at[jnp.array(receivers, jnp.int32)].set(True)
    received = by_place[lax.axis_index(name)]
    return jax.tree.map(lambda t: jnp.where(received, t, jnp.asarray(fill, t.dtype)), moved)


def _all_axes() -> tuple[str, ...]:
    wafer = inside()
    if wafer is not None:
        return wafer.axes
    return jax_collectives.device_axes()


def names_of(along: Along) -> tuple[Resolved, ...]:
    """The mesh's names for the axes `along`, without the axes that it lacks."""
    axes = (along,) if isinstance(along, str) else along
    wafer = inside()
    if wafer is None:
        # A backward trace, or the user's own shard_map: the names are the mesh's already.
        on_mesh = jax_collectives.device_axes()
        names = tuple(a for a in axes if a != WAFERS or isinstance(a, Resolved) or a in on_mesh)
    else:
        names = tuple(a if isinstance(a, Resolved) else _mesh_name(wafer, a) or "" for a in axes)
    return tuple(Resolved(name) for name in names if name)


def _mesh_name(wafer: "Wafer", axis: str) -> str | None:
    """None for the wafer axis of a single wafer; a mesh's own name stands for itself."""
    name = wafer.axis_name(axis)
    if name is not None or axis == WAFERS:
        return name
    if axis in {mesh_name for _, mesh_name in wafer.names}:
        return axis
    raise ValueError(f"fabric: {axis!r} is not an axis of the wafer, which has {wafer.axes}")
