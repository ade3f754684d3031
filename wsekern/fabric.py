"""This file is what one PE can say to others: every move of data between PEs is one of these.

Public per-PE functions: call them inside a kernel that `Wafer.map` runs. `along` is an axis of the
grid (`"y"`, `"x"`, `"wafer"`) or, where it says so, a tuple of them; an axis that the wafer does
not have has one PE. Meanings and gradients are the same on devices and on virtual PEs.
Costs are per PE: words sent, and steps that wait for one another.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.axes import WAFERS
from wsekern.context import inside

Along = str | tuple[str, ...]
Op = Literal["sum", "max", "min", "mean"]
# In which order the PEs of a line stand in a ring: 0 1 2 3 4 5, whose ends are a whole line apart,
# or 0 2 4 5 3 1, in which no two neighbours are more than two hops apart.
Ring = Literal["plain", "folded"]
_LISTED = 4096  # PEs of a grid up to which one permutation may name each of them


def axis_size(along: Along) -> int:
    """How many PEs stand along `along` (a tuple: their product)."""
    return math.prod(lax.axis_size(name) for name in _names(along))


def axis_index(along: Along) -> jax.Array:
    """This PE's place along `along`, int32 (a tuple: row-major, the first axis outermost)."""
    index = jnp.int32(0)
    for name in _names(along):
        index = index * lax.axis_size(name) + lax.axis_index(name)
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
    """Every PE's `x` moved `by` places along `along`, towards higher indices if positive.

    All words of the tile are sent, once, in one step.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      by: how far; any integer.
      periodic: whether what leaves at one edge enters at the other.
      fill: what enters at an open edge.
      ring: the order of the PEs; "folded" is for periodic shifts.
    """
    size, order = axis_size(along), _order(axis_size(along), ring)
    if periodic:
        return _permute(x, along, [(order[i], order[(i + by) % size]) for i in range(size)], fill)
    pairs = [(order[i], order[i + by]) for i in range(size) if 0 <= i + by < size]
    return _permute(x, along, pairs, fill)


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
    if not _names(by):
        return shift(x, along, plus, ring=ring)
    if not _names(along):
        return x
    if _virtual() or size * others > _LISTED:
        amount = (times * ring_index(by, ring) + plus) % size
        for bit in range((size - 1).bit_length()):
            moved = shift(x, along, 2**bit, ring=ring)
            moves = (amount >> bit) % 2 == 1
            x = jax.tree.map(lambda new, old, m=moves: jnp.where(m, new, old), moved, x)
        return x
    return _skew_at_once(x, along, by, times, plus, ring)


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
    return _permute(x, along, list(pairs), fill)


def broadcast(x: Any, along: Along, root: int = 0) -> Any:
    """The root's `x`, on every PE along `along`.

    On devices it is a sum in which all others add zero; each PE sends its tile's words about twice.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several.
      root: the place of the sender (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid.
    """
    _check_root("broadcast", along, root)
    mine = axis_index(along) == root

    def one(tile):
        # select, not a product: whatever the others hold, an infinity included, adds nothing.
        kept = jnp.where(mine, tile, jnp.zeros((), tile.dtype))
        if tile.dtype == jnp.bool_:
            return all_reduce(kept.astype(jnp.int32), along).astype(jnp.bool_)
        return all_reduce(kept, along)

    return jax.tree.map(one, x)


def reduce(x: Any, along: Along, root: int = 0, op: Op = "sum") -> Any:
    """`x` reduced over `along`, on the root; zeros on every other PE.

    Raises:
      ValueError: `root` is outside the grid, or `op` is unknown.
    """
    _check_root("reduce", along, root)
    mine = axis_index(along) == root
    whole = all_reduce(x, along, op)
    return jax.tree.map(lambda tile: jnp.where(mine, tile, jnp.zeros((), tile.dtype)), whole)


def all_reduce(x: Any, along: Along, op: Op = "sum") -> Any:
    """`x` reduced over `along`, on every PE.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several.
      op: "sum", "max", "min" or "mean".

    Raises:
      ValueError: `op` is unknown.
    """
    moves = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin, "mean": lax.pmean}
    if op not in moves:
        raise ValueError(f"fabric.all_reduce: op={op!r} is not one of {sorted(moves)}")
    for name in reversed(_names(along)) if _virtual() else [_names(along)]:
        x = moves[op](x, name) if name else x
    return x


def all_gather(x: Any, along: Along, axis: int = 0, *, replicated: bool = False) -> Any:
    """All PEs' tiles along `along`, joined in order along dimension `axis`, on every PE.

    A PE receives all the others' words, and holds as many copies of a tile as there are PEs.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several (the first outermost).
      axis: the dimension of the tile that grows.
      replicated: whether JAX shall know that every PE now holds the same, so that it may leave the
        kernel through a spec that does not name `along`.
    """
    kind = "invarying" if replicated and not _virtual() else "varying"
    for name in reversed(_names(along)):  # the innermost neighbours are joined first
        x = jax.tree.map(lambda t, n=name: _gather(t, n, axis, kind), x)
    return x


def reduce_scatter(x: Any, along: Along, axis: int = 0) -> Any:
    """`x` summed over `along`, of which this PE keeps its own part of dimension `axis`.

    The inverse layout of `all_gather`, and its gradient.

    Raises:
      ValueError: dimension `axis` does not divide by the PEs along `along`.
    """
    _check_parts("reduce_scatter", x, along, axis)
    for name in _names(along):
        x = jax.tree.map(
            lambda t, n=name: lax.psum_scatter(
                varying(t, along), n, scatter_dimension=axis % t.ndim, tiled=True
            ),
            x,
        )
    return x


def all_to_all(x: Any, along: str, split: int, concat: int) -> Any:
    """Dimension `split` of `x` dealt out to the PEs along `along`, what comes joined at `concat`.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis.
      split: the dimension whose parts go to different PEs.
      concat: the dimension along which the parts received are joined, in order of sender.

    Raises:
      ValueError: dimension `split` does not divide by the PEs along `along`.
    """
    _check_parts("all_to_all", x, along, split)
    for name in _names(along):
        # Of an operand that is the same on all PEs, vmap's all_to_all has the wrong shape.
        x = jax.tree.map(
            lambda t, n=name: lax.all_to_all(
                varying(t, along), n, split % t.ndim, concat % t.ndim, tiled=True
            ),
            x,
        )
    return x


def varying(x: Any, along: Along | None = None) -> Any:
    """`x`, typed as one that may differ from PE to PE, as a fresh carry of a scan has to be.

    Args:
      x: a tile, or a pytree of tiles.
      along: the axes; by default all of the wafer.
    """
    names = _names(_all_axes() if along is None else along)
    return jax.tree.map(lambda tile: _vary(jnp.asarray(tile), names), x)


def _vary(tile: jax.Array, names: tuple[str, ...]) -> jax.Array:
    for name in names:
        if _virtual():
            # No cast exists under vmap; a select by this PE's place makes the tile batched.
            tile = jnp.where(lax.axis_index(name) >= 0, tile, jnp.zeros_like(tile))
            continue
        try:
            tile = lax.pcast(tile, (name,), to="varying")
        except ValueError:
            pass  # it varies along this axis already, which no public call tells
    return tile


def _order(size: int, ring: Ring) -> list[int]:
    """The place on the line of each place in the ring."""
    if ring == "plain":
        return list(range(size))
    return [*range(0, size, 2), *reversed(range(1, size, 2))]


def _skew_at_once(x: Any, along: str, by: str, times: int, plus: int, ring: Ring) -> Any:
    # JAX numbers the PEs of several axes in the order of the mesh, however they are named here.
    places = jax.sharding.get_abstract_mesh().axis_names
    names = tuple(sorted((*_names(by), *_names(along)), key=places.index))
    size, others = axis_size(along), axis_size(by)
    step, row = (1, size) if names[1] in _names(along) else (others, 1)
    order, rows = _order(size, ring), _order(others, ring)
    pairs = [
        (
            rows[j] * row + order[i] * step,
            rows[j] * row + order[(i + times * j + plus) % size] * step,
        )
        for j in range(others)
        for i in range(size)
    ]
    return jax.tree.map(lambda t: lax.ppermute(varying(t, (by, along)), names, pairs), x)


def _permute(x: Any, along: str, pairs: list[tuple[int, int]], fill: float) -> Any:
    names = _names(along)
    if not names:
        stays = (0, 0) in pairs
        return x if stays else jax.tree.map(lambda t: jnp.full_like(t, fill), x)
    (name,) = names
    size = lax.axis_size(name)
    receives = sorted(destination for _, destination in pairs)
    # A permutation under vmap must be complete: the rest is paired off, then masked.
    if _virtual() and len(pairs) < size:
        idle = [i for i in range(size) if i not in {s for s, _ in pairs}]
        deaf = [i for i in range(size) if i not in set(receives)]
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


def _gather(tile: jax.Array, name: str, axis: int, kind: str) -> jax.Array:
    tile = varying(tile, name) if _virtual() else tile
    return lax.all_gather(tile, name, axis=axis % tile.ndim, tiled=True, to=kind)


def _virtual() -> bool:
    # Asked of JAX, not of the wafer: it holds in a backward trace, where no wafer is in force.
    return not jax.sharding.get_abstract_mesh().manual_axes


def _all_axes() -> tuple[str, ...]:
    wafer = inside()
    if wafer is not None:
        return wafer.axes
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _names(along: Along) -> tuple[str, ...]:
    """What the mesh at hand calls the axes `along`, without those that it lacks."""
    axes = (along,) if isinstance(along, str) else along
    wafer = inside()
    if wafer is not None:
        return tuple(n for n in (wafer.axis_name(a) or _own(wafer, a) for a in axes) if n)
    return tuple(a for a in axes if a != WAFERS or a in _bound())


def _own(wafer, axis: str) -> str | None:
    """None for the wafer axis of a single wafer; a mesh's own name stands for itself."""
    if axis == WAFERS:
        return None
    if axis in {name for _, name in wafer.names}:
        return axis
    raise ValueError(f"fabric: {axis!r} is not an axis of the wafer, which has {wafer.axes}")


def _bound() -> tuple[str, ...]:
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _check_root(what: str, along: Along, root: int) -> None:
    size = axis_size(along)
    if not 0 <= root < size:
        raise ValueError(f"fabric.{what}: root={root} is outside 0 to {size - 1} along {along!r}")


def _check_parts(what: str, x: Any, along: Along, axis: int) -> None:
    size = axis_size(along)
    for tile in jax.tree.leaves(x):
        if tile.shape[axis] % size:
            raise ValueError(
                f"fabric.{what}: dimension {axis} of a tile of shape {tile.shape} does not divide "
                f"by the {size} PEs along {along!r}"
            )
