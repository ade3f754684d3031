"""Broadcasts and reductions, by the algorithm that is named or by the cheapest."""

import functools
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from wsekern.fabric import flood, jax_collectives
from wsekern.fabric.exchange import check_root
from wsekern.fabric.jax_collectives import is_virtual
from wsekern.fabric.moves import Along, TileTree, axis_index, axis_size, names_of, varying
from wsekern.fabric.reductions import chain, choice, line, ring
from wsekern.fabric.reductions.choice import Algorithm
from wsekern.fabric.reductions.operation import OPERATIONS, Op
from wsekern.wafer.axes import WAFERS


def broadcast(x: TileTree, along: Along, root: int = 0) -> TileTree:
    """The root's `x`, on every PE along `along`: a flood, one step of B words.

    On a wafer, `B + P + 2 T_R` cycles from the end of a line of P PEs, and `B + M + N - 2 + 2 T_R +
    1` from the corner of a grid of M x N; T_R is 2, the cycles of a ramp between PE and router. On
    devices it is a sum to which the other PEs add zeros; each PE sends its tile about twice.

    Args:
      x: a tile, or a pytree of tiles; only the root's counts.
      along: one axis or several.
      root: the place of the sender (`axis_index`).

    Raises:
      ValueError: `root` is outside the grid.
    """
    check_root("broadcast", along, root)
    return flood.from_root(x, along, root)


def reduce(
    x: TileTree, along: Along, root: int = 0, op: Op = "sum", *, algorithm: Algorithm = "auto"
) -> TileTree:
    """`x` reduced over `along`, on the root; zeros on every other PE.

    Cycles on a line of P PEs with the root at its end, for tiles of B words (T_R = 2):

    - "star", best for one word: `B (P - 1) + 2 T_R + 1`;
    - "tree" (binary), best for few words on few PEs: `max(B lg P, B P lg P / (2 (P - 1))) + P - 1 +
      (2 T_R + 1) lg P`;
    - "two_phase", best if a tile has about as many words as the line has PEs: about `2 B + P - 1 +
      (2 T_R + 1) (2 sqrt(P) - 2)`;
    - "chain", pipelined, best for many words: `B + (2 T_R + 2) (P - 1)`;
    - "optimal", the cheapest tree that dynamic programming finds;
    - "k_tree", two levels of chains to the middle of the line, for roots there: `4 B + P / 2 + (2
      T_R + 1) (G + P / G) / 2` with groups of G, about sqrt(P), PEs;
    - "snake", a chain through both axes of the grid;
    - "xla", XLA's own collective;
    - "auto": XLA's on devices, and on a wafer the one with the fewest predicted cycles
      (`predicted_cycles`; `received` gives the words and steps of each).

    The formulas are from Luczynski et al., "Near-Optimal Wafer-Scale Reduce", HPDC 2024, and for
    "k_tree" from He et al., "WaferLLM", OSDI 2025. Sums and means have exact derivatives of any
    order in both modes; the others refuse to be differentiated.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several. Several are reduced in turn, the last first; "wafer" is always
        reduced by XLA.
      root: the place of the PE that gets the result (`axis_index`).
      op: "sum", "max", "min" or "mean".
      algorithm: one of the names above.

    Raises:
      ValueError: `root` is outside the grid, or `op` or `algorithm` is unknown or cannot serve.
    """
    _check("reduce", op, algorithm, along, root)
    check_root("reduce", along, root)
    return _reduce_each(x, along, op, algorithm, root)


def all_reduce(
    x: TileTree, along: Along, op: Op = "sum", *, algorithm: Algorithm = "auto"
) -> TileTree:
    """`x` reduced over `along`, on every PE; JAX types it as the same on each.

    It is a reduction to the PE that suits the algorithm, and a flood from there: one step and B
    words more than `reduce`. "ring" instead sums parts of the tile on different PEs, then gathers
    them: `2 (P - 1) B / P + 4 P - 6 + 2 (P - 1) (2 T_R + 1)` cycles on a line of P PEs.

    Sums and means have XLA's derivatives, of any order and in both modes. For "max" and "min" put
    `lax.stop_gradient` around `x`.

    Args:
      x: a tile, or a pytree of tiles.
      along: one axis or several. Several are reduced in turn, the last first; "wafer" is always
        reduced by XLA.
      op: "sum", "max", "min" or "mean".
      algorithm: "star", "chain", "tree", "two_phase", "optimal", "k_tree", "snake" or "xla", as for
        `reduce`; "ring"; or "auto": XLA's on devices, and on a wafer the one with the fewest
        predicted cycles.

    Raises:
      ValueError: `op` or `algorithm` is unknown or cannot serve.
    """
    _check("all_reduce", op, algorithm, along, None)
    return _reduce_each(x, along, op, algorithm, None)


def _reduce_each(
    x: TileTree, along: Along, op: Op, algorithm: Algorithm, root: int | None
) -> TileTree:
    names, grid = names_of(along), names_of(_grid_axes(along))
    sizes = [axis_size(name) for name in grid]
    # Several wafers: first reduce to all PEs of each, then let XLA reduce between them.
    between = tuple(name for name in names if name not in grid)
    root_on_wafer = None if between else root

    def reduce_tile(tile: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        if tile.dtype == jnp.bool_ and op in ("sum", "mean"):
            tile = tile.astype(jnp.int32)  # count what is true, as XLA does
        words = tile.size * tile.dtype.itemsize / 4
        chosen = choice.choose(algorithm, sizes, words, root_on_wafer)
        if chosen == "xla" or not grid:
            return _reduce_by_xla(tile, names, root, op)
        tile = _reduce_on_fabric(tile, grid, root_on_wafer, op, chosen)
        if between:
            tile = _reduce_by_xla(tile, between, None, op)
            tile = tile if root is None else _on_root(tile, names, root)
        return tile

    return jax.tree.map(reduce_tile, x)


def _reduce_on_fabric(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int | None, op: Op, algorithm: str
) -> Shaped[Array, "..."]:
    """The reduction by an algorithm of the fabric, with the gradient of XLA's."""
    tile = varying(tile, names)
    if op not in ("sum", "mean"):
        return _by_algorithm(_without_gradient(tile, op), names, root, op, algorithm)
    if not is_virtual():
        return _differentiable(tile, names, root, op, algorithm)
    # Under vmap a rule of differentiation runs inside a jit, where the axes have no names any more.
    # So the derivative is grafted on: XLA's sum is traced for it, and its value never computed.
    value = _by_algorithm(lax.stop_gradient(tile), names, root, op, algorithm)
    return _graft_derivative(value, _reduce_by_xla(tile, names, root, op))


# The derivative of a sum is one sum, but plain autodiff would save every step of a scan and run it
# backwards. So the derivative is that of XLA's sum, which knows whether cotangents are summed
# already. The rule calls `_differentiable` again, and so it works for derivatives of any order.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3, 4))
def _differentiable(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int | None, op: Op, algorithm: str
) -> Shaped[Array, "..."]:
    return _by_algorithm(tile, names, root, op, algorithm)


@_differentiable.defjvp
def _differentiable_jvp(
    names: tuple[str, ...],
    root: int | None,
    op: Op,
    algorithm: str,
    primals: tuple[Shaped[Array, "..."]],
    tangents: tuple[Shaped[Array, "..."]],
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    (tile,), (dtile,) = primals, tangents
    out = _differentiable(tile, names, root, op, algorithm)
    return out, _reduce_by_xla(dtile, names, root, op)


@jax.custom_jvp
def _graft_derivative(
    value: Shaped[Array, "..."], source_of_derivative: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    del source_of_derivative
    return value


@_graft_derivative.defjvp
def _graft_derivative_jvp(
    primals: tuple[Shaped[Array, "..."], Shaped[Array, "..."]],
    tangents: tuple[Shaped[Array, "..."], Shaped[Array, "..."]],
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    return _graft_derivative(*primals), tangents[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _without_gradient(tile: Shaped[Array, "..."], op: Op) -> Shaped[Array, "..."]:
    return tile


def _refuse_gradient(op: Op, residuals: None, dout: Shaped[Array, "..."]) -> NoReturn:
    raise ValueError(
        f"fabric: op={op!r} has no gradient; put lax.stop_gradient around what is reduced"
    )


_without_gradient.defvjp(lambda tile, op: (tile, None), _refuse_gradient)


def _reduce_by_xla(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int | None, op: Op
) -> Shaped[Array, "..."]:
    collective = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin, "mean": lax.pmean}[op]
    tile = jax_collectives.reduce_over(collective, tile, names) if names else tile
    return tile if root is None else _on_root(tile, names, root)


def _by_algorithm(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int | None, op: Op, algorithm: str
) -> Shaped[Array, "..."]:
    if is_virtual():
        return _run(tile, names, root, op, algorithm)
    return _named_call(tuple(names), root, op, algorithm)(tile)


@functools.cache
def _named_call(names: tuple[str, ...], root: int | None, op: Op, algorithm: str) -> Callable:
    """`_run` as a call named after the algorithm, so that the estimator finds it in a trace."""

    def run(tile: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return _run(tile, names, root, op, algorithm)

    run.__name__ = f"reduction_{algorithm}_{'all' if root is None else root}"
    return jax.jit(run)


def _run(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int | None, op: Op, algorithm: str
) -> Shaped[Array, "..."]:
    if algorithm == "ring":
        for name in reversed(names):
            tile = ring.all_reduce(tile, name, OPERATIONS[op])
    else:
        sizes = [axis_size(name) for name in names]
        at = choice.root_of(algorithm, sizes) if root is None else root
        tile = _reduce_to_root(tile, names, at, op, algorithm)
        tile = flood.from_root(tile, names, at) if root is None else _on_root(tile, names, at)
    return tile / axis_size(names) if op == "mean" else tile


def _on_root(tile: Shaped[Array, "..."], names: tuple[str, ...], root: int) -> Shaped[Array, "..."]:
    """`tile` on the root, zeros elsewhere."""
    return jnp.where(axis_index(tuple(names)) == root, tile, jnp.zeros((), tile.dtype))


def _reduce_to_root(
    tile: Shaped[Array, "..."], names: tuple[str, ...], root: int, op: Op, algorithm: str
) -> Shaped[Array, "..."]:
    """The reduction on the PE `root` of the grid; on other PEs a value without meaning."""
    sizes = [axis_size(name) for name in names]
    places = choice.places_of(root, sizes)
    if algorithm == "snake":
        place = choice.snake_place(places, sizes)
        return chain.reduce(tile, line.snake(*names), place, OPERATIONS[op])
    reduce_line = choice.LINES[algorithm].reduce
    for name, size, place in reversed(list(zip(names, sizes, places, strict=True))):
        if size > 1:
            tile = reduce_line(tile, line.along(name), place, OPERATIONS[op])
    return tile


def _grid_axes(along: Along) -> tuple[str, ...]:
    """The axes of `along` whose PEs are neighbors on the fabric: all but the wafers'."""
    axes = (along,) if isinstance(along, str) else along
    wafers = names_of(WAFERS)
    return tuple(axis for axis in axes if axis != WAFERS and axis not in wafers)


def _check(operation: str, op: str, algorithm: str, along: Along, root: int | None) -> None:
    if op not in OPERATIONS:
        raise ValueError(f"fabric.{operation}: op={op!r} is not one of {sorted(OPERATIONS)}")
    choice.check(operation, algorithm, len(names_of(_grid_axes(along))), root)
