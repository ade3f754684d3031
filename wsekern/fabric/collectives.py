"""This file is broadcasts and reductions, by the algorithm named or the one that suits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wsekern.fabric import flood, jax_collectives
from wsekern.fabric.exchange import check_root
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.fabric.moves import Along, axis_index, axis_size, names_of, varying
from wsekern.fabric.reductions import chain, choice, line, ring
from wsekern.fabric.reductions.choice import Algorithm
from wsekern.fabric.reductions.operation import OPERATIONS, Op
from wsekern.wafer.axes import WAFERS


def broadcast(x: Any, along: Along, root: int = 0) -> Any:
    """The root's `x`, on every PE along `along`: a flood, one step of B words.

    `B + P + 2 T_R` cycles from the end of a line, `B + M + N - 2 + 2 T_R + 1` from the corner of a
    grid. On devices it is a sum in which all others add zero; each PE sends its tile about twice.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several.
      root: the place of the sender (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid.
    """
    check_root("broadcast", along, root)
    return flood.from_root(x, along, root)


def reduce(
    x: Any, along: Along, root: int = 0, op: Op = "sum", *, algorithm: Algorithm = "auto"
) -> Any:
    """`x` reduced over `along`, on the root; zeros on every other PE.

    Words, steps and cycles are those of the algorithm (`wsekern/fabric/reductions/`). Sums and
    means have exact derivatives of any order, in both modes; others refuse.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several; of several, each in turn, the last first. Over wafers it is XLA's.
      root: the place of the PE that gets the result (`axis_index`).
      op: "sum", "max", "min" or "mean".
      algorithm: "star", "chain", "tree", "two_phase", "optimal", "k_tree"; "snake", a chain through
        both axes of the grid; "xla", what XLA does; or "auto": XLA's on devices, on a wafer the one
        predicted to take the fewest cycles.

    Raises:
      ValueError: `root` is outside the grid, or `op` or `algorithm` is unknown or cannot serve.
    """
    _check("reduce", op, algorithm, along, root)
    check_root("reduce", along, root)
    return _each(x, along, op, algorithm, root)


def all_reduce(x: Any, along: Along, op: Op = "sum", *, algorithm: Algorithm = "auto") -> Any:
    """`x` reduced over `along`, on every PE, and JAX knows that it is the same on each.

    A reduction to the PE that suits the algorithm and a flood from it: one step and B words more
    than `reduce`. Sums and means have XLA's derivatives, of any order and in both modes; for the
    others put `lax.stop_gradient` around `x`.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several; of several, each in turn, the last first. Over wafers it is XLA's.
      op: "sum", "max", "min" or "mean".
      algorithm: as for `reduce`, or "ring": parts are summed on different PEs and then gathered.

    Raises:
      ValueError: `op` or `algorithm` is unknown or cannot serve.
    """
    _check("all_reduce", op, algorithm, along, None)
    return _each(x, along, op, algorithm, None)


def _each(x: Any, along: Along, op: Op, algorithm: Algorithm, root: int | None) -> Any:
    names, grid = names_of(along), names_of(_of_grid(along))
    sizes = [axis_size(name) for name in grid]
    # Over several wafers too: first to all PEs of each, then XLA's between them.
    between = tuple(name for name in names if name not in grid)
    here = None if between else root

    def one(tile):
        if tile.dtype == jnp.bool_ and op in ("sum", "mean"):
            tile = tile.astype(jnp.int32)  # truths are counted, as XLA does
        words = tile.size * tile.dtype.itemsize / 4
        taken = choice.chosen(algorithm, sizes, words, here)
        if taken == "xla" or not grid:
            return _by_xla(tile, names, root, op)
        tile = _reduced(tile, grid, here, op, taken)
        if between:
            tile = _by_xla(tile, between, None, op)
            tile = tile if root is None else _on_root(tile, names, root)
        return tile

    return jax.tree.map(one, x)


def _reduced(tile, names, root, op, algorithm):
    """The reduction by an algorithm of the fabric, with the gradient of XLA's."""
    tile = varying(tile, names)
    if op not in ("sum", "mean"):
        return _by_algorithm(_refusing(tile, op), names, root, op, algorithm)
    if not is_virtual():
        return _differentiable(tile, names, root, op, algorithm)
    # Under vmap what a rule of differentiation calls knows no axis any more once it is jitted.
    # Of XLA's sum only the derivative is used, so that its value is never computed.
    value = _by_algorithm(lax.stop_gradient(tile), names, root, op, algorithm)
    return _grafted(value, _by_xla(tile, names, root, op))


# Plain autodiff would keep every step of a scan, and run it backwards, for what is one sum. The
# derivative is that of XLA's sum, which knows whether cotangents are summed already. The rules call
# what they are rules of, so that they hold for derivatives of any order.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _differentiable(tile, names, root, op, algorithm):
    return _by_algorithm(tile, names, root, op, algorithm)


@_differentiable.defjvp
def _differentiable_jvp(names, root, op, algorithm, tiles, dtiles):
    (tile,), (dtile,) = tiles, dtiles
    out = _differentiable(tile, names, root, op, algorithm)
    return out, _by_xla(dtile, names, root, op)


@jax.custom_jvp
def _grafted(value, source_of_derivative):
    del source_of_derivative
    return value


@_grafted.defjvp
def _grafted_jvp(primals, tangents):
    return _grafted(*primals), tangents[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _refusing(tile, op):
    return tile


def _refuse(op, _, dout):
    raise ValueError(
        f"fabric: op={op!r} has no gradient; put lax.stop_gradient around what is reduced"
    )


_refusing.defvjp(lambda tile, op: (tile, None), _refuse)


def _by_xla(tile: jax.Array, names: Sequence[str], root: int | None, op: Op) -> jax.Array:
    move = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin, "mean": lax.pmean}[op]
    tile = jax_collectives.reduce_over(move, tile, names) if names else tile
    return tile if root is None else _on_root(tile, names, root)


def _by_algorithm(tile, names, root, op, algorithm):
    if is_virtual():
        return _run(tile, names, root, op, algorithm)
    return _named(tuple(names), root, op, algorithm)(tile)


@functools.cache
def _named(names: tuple[str, ...], root: int | None, op: Op, algorithm: str):
    """`_run`, as a call by the algorithm's name, under which a wafer prices a trace of it."""

    def run(tile):
        return _run(tile, names, root, op, algorithm)

    run.__name__ = f"reduction_{algorithm}_{'all' if root is None else root}"
    return jax.jit(run)


def _run(tile, names, root, op, algorithm):
    if algorithm == "ring":
        for name in reversed(names):
            tile = ring.all_reduced(tile, name, OPERATIONS[op])
    else:
        sizes = [axis_size(name) for name in names]
        at = choice.root_of(algorithm, sizes) if root is None else root
        tile = _rooted(tile, names, at, op, algorithm)
        tile = flood.from_root(tile, names, at) if root is None else _on_root(tile, names, at)
    return tile / axis_size(names) if op == "mean" else tile


def _on_root(tile: jax.Array, names: Sequence[str], root: int) -> jax.Array:
    """`tile` on the root, zeros elsewhere."""
    return jnp.where(axis_index(tuple(names)) == root, tile, jnp.zeros((), tile.dtype))


def _rooted(tile: jax.Array, names: Sequence[str], root: int, op: Op, algorithm: str):
    """The reduction on the PE `root` of the grid; elsewhere what is of no use."""
    sizes = [axis_size(name) for name in names]
    places = choice.places_of(root, sizes)
    if algorithm == "snake":
        place = choice.snake_place(places, sizes)
        return chain.reduced(tile, line.snake(*names), place, OPERATIONS[op])
    reduced = choice.LINES[algorithm].reduced
    for name, size, place in reversed(list(zip(names, sizes, places, strict=True))):
        if size > 1:
            tile = reduced(tile, line.along(name), place, OPERATIONS[op])
    return tile


def _of_grid(along: Along) -> tuple[str, ...]:
    """The axes of `along` whose PEs are neighbors on the fabric."""
    axes = (along,) if isinstance(along, str) else along
    wafers = names_of(WAFERS)
    return tuple(axis for axis in axes if axis != WAFERS and axis not in wafers)


def _check(what: str, op: str, algorithm: str, along: Along, root: int | None) -> None:
    if op not in OPERATIONS:
        raise ValueError(f"fabric.{what}: op={op!r} is not one of {sorted(OPERATIONS)}")
    choice.check(what, algorithm, len(names_of(_of_grid(along))), root)
