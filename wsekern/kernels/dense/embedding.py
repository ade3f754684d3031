"""Embedding lookup in a table whose vocabulary is split along x and whose features along y.

M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, section 3, for a table split over the vocabulary. Splitting the features too
gives the table the layout of an output head, transposed.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer, Shaped

from wsekern import fabric
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.limits import keeps_shares, on_accelerators
from wsekern.wafer.wafer import Wafer

_TABLE = P(COLS, ROWS)


def embedding(
    tokens: Integer[Array, "*batch T"], table: Float[Array, "V D"], *, wafer: Wafer | None = None
) -> Float[Array, "*batch T D"]:
    """`table[tokens]`, tiled: rows along y, features along x.

    Algorithm: Megatron-LM's, with the features split too. Each PE looks up the tokens of its own
    part of the vocabulary, in partial rows. Whichever is less moves along y: the table, gathered to
    V / width rows of all features, or the tokens, whose partial rows then come back by an
    all-to-all. One reduce-scatter along x sums the partial rows, and leaves each PE its features of
    them; until then it holds width times its part of the result. On a square of accelerators
    partial rows are summed first, and their sums reflected in the diagonal, which is less. Where
    each accelerator is a wafer too, it looks up its share of the features for the tokens of all, if
    that is less than the table. The gradient takes the same way back, is summed in float32, and
    over the wafers. Reverse mode only.

    Args:
      tokens: rows of the table to take. T lies along y, the first leading dimension over the
        wafers. A token outside 0 to V - 1 gives a row of NaN, and no gradient.
      table: one row for each token, laid out `P("x", "y")`: an output head's `P("y", "x")`
        transposed.
      wafer: where to run; by default the current wafer, and the plain local operation without one.

    Raises:
      ValueError: the shapes do not fit, the tokens are not integers or the table is not floating.
    """
    tokens, table = layout.as_array(tokens), layout.as_array(table)
    _check(tokens, table)
    tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.int32))  # V may not fit a byte
    wafer = context.resolve(wafer)
    if wafer is None:
        return _local(tokens, table)
    rows = layout.tiled(tokens.ndim, ROWS)
    padded = layout.pad(tokens, rows, wafer), layout.pad(table, _TABLE, wafer)
    out = _embedding(*padded, table.shape, wafer)
    return layout.crop(out, (*tokens.shape, table.shape[1]), layout.tiled(out.ndim), wafer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embedding(
    tokens: Integer[Array, "*batch T"],
    table: Float[Array, "V D"],
    sizes: tuple[int, int],
    wafer: Wafer,
) -> Float[Array, "*batch T _"]:
    return _fwd(tokens, table, sizes, wafer)[0]


# Plain autodiff would scatter in the table's dtype, which may be too short to sum in.
def _fwd(
    tokens: Integer[Array, "*batch T"],
    table: Float[Array, "V D"],
    sizes: tuple[int, int],
    wafer: Wafer,
) -> tuple[Float[Array, "*batch T _"], tuple[Integer[Array, "*batch T"], Float[Array, "V D"]]]:
    rows, tiled = layout.tiled(tokens.ndim, ROWS), layout.tiled(tokens.ndim + 1)
    way = _way(tokens, table, wafer)
    if way.table_moves:  # whole, from all wafers
        way = dataclasses.replace(way, shares=False)
    kernel = functools.partial(_per_pe, sizes=sizes, way=way)
    out = wafer.map(kernel, in_specs=(rows, way.table), out_specs=tiled)(tokens, table)
    return out, (tokens, table)


def _bwd(
    sizes: tuple[int, int],
    wafer: Wafer,
    residuals: tuple[Integer[Array, "*batch T"], Float[Array, "V D"]],
    dout: Float[Array, "*batch T _"],
) -> tuple[None, Float[Array, "V D"]]:
    tokens, table = residuals
    rows, tiled = layout.tiled(tokens.ndim, ROWS), layout.tiled(dout.ndim)
    way = _way(tokens, table, wafer)
    kernel = functools.partial(_gradient_per_pe, way=way)
    run = wafer.map(kernel, in_specs=(rows, way.table, tiled), out_specs=way.table)
    return None, run(tokens, table, dout)


_embedding.defvjp(_fwd, _bwd)


@dataclasses.dataclass(frozen=True)
class _Way:
    """How rows go to the PEs of their tokens, and gradients back."""

    table_moves: bool  # along y, to the tokens; it is less than the partial rows
    shares: bool  # each wafer has a share of the table's features
    reflects: bool  # partial rows are summed first, then reflected in the grid's diagonal

    @property
    def table(self) -> P:
        return P(COLS, (ROWS, WAFERS)) if self.shares else _TABLE


def _way(tokens: Integer[Array, "*batch T"], table: Float[Array, "V D"], wafer: Wafer) -> _Way:
    one_for_all = tokens.ndim > 1  # of a batch, wafers have parts
    divides = table.shape[1] % (wafer.height * wafer.wafers) == 0
    of_a_row = tokens.size // (wafer.height * (wafer.wafers if one_for_all else 1))
    table_moves = table.shape[0] // wafer.width <= of_a_row
    square = wafer.height == wafer.width
    return _Way(
        table_moves=table_moves,
        shares=one_for_all and divides and keeps_shares(wafer),
        reflects=square and not table_moves and on_accelerators(wafer),
    )


def _per_pe(
    tokens: Integer[Array, "*batch Tt"],
    table: Float[Array, "Vt D_"],
    sizes: tuple[int, int],
    way: _Way,
) -> Float[Array, "*batch Tt Dx"]:
    V, D = sizes  # without padding
    row, feature = tokens.ndim - 1, tokens.ndim
    if way.table_moves:
        rows = _look_up(tokens, fabric.all_gather(table, ROWS, 1))
    else:
        rows = _look_up(_gather_tokens(tokens, way), table)
        if way.shares:
            rows = fabric.all_to_all(rows, WAFERS, 0, feature)
    if way.reflects:
        rows = fabric.transpose(fabric.reduce_scatter(rows, COLS, row))
    else:
        if not way.table_moves:
            rows = fabric.all_to_all(rows, ROWS, row, feature)
        # D was padded to the height of the grid; the result is padded to its width.
        rows = layout.resize(rows, -1, -(-D // fabric.axis_size(COLS)) * fabric.axis_size(COLS))
        rows = fabric.reduce_scatter(rows, COLS, feature)
    known = (tokens >= 0) & (tokens < V)
    return jnp.where(known[..., None], rows, jnp.nan)


def _gradient_per_pe(
    tokens: Integer[Array, "*batch Tt"],
    table: Float[Array, "Vt D_"],
    dout: Float[Array, "*batch Tt Dx"],
    way: _Way,
) -> Float[Array, "Vt D_"]:
    row, feature = tokens.ndim - 1, tokens.ndim
    if way.reflects:
        drows = fabric.all_gather(fabric.transpose(dout), COLS, row)
    else:
        drows = fabric.all_gather(dout, COLS, feature)
        parts = fabric.axis_size(ROWS) * (fabric.axis_size(WAFERS) if way.shares else 1)
        drows = layout.resize(drows, -1, table.shape[1] * parts)
    if way.table_moves:
        dtable = fabric.reduce_scatter(_scatter_add(tokens, drows, table.shape[0]), ROWS, 1)
        if way.shares:
            return fabric.reduce_scatter(dtable, WAFERS, 1).astype(table.dtype)
    else:
        if not way.reflects:
            drows = fabric.all_to_all(drows, ROWS, feature, row)
        if way.shares:
            drows = fabric.all_to_all(drows, WAFERS, feature, 0)
        dtable = _scatter_add(_gather_tokens(tokens, way), drows, table.shape[0])
    # Tokens without a leading dimension are replicated over the wafers, and so is their gradient.
    if tokens.ndim > 1 and not way.shares:
        dtable = fabric.all_reduce(dtable, WAFERS)
    return dtable.astype(table.dtype)


def _gather_tokens(tokens: Integer[Array, "*batch Tt"], way: _Way) -> Integer[Array, "..."]:
    """The tokens of this column and, for shares of the features, of all wafers."""
    tokens = fabric.all_gather(tokens, ROWS, tokens.ndim - 1)
    return fabric.all_gather(tokens, WAFERS, 0) if way.shares else tokens


def _look_up(
    tokens: Integer[Array, "*batch Tt"], table: Float[Array, "Vt D"]
) -> Float[Array, "*batch Tt D"]:
    """The rows of tokens in this PE's part of the vocabulary, and zeros for the others."""
    return table.at[_local_index(tokens, table.shape[0])].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )


def _scatter_add(
    tokens: Integer[Array, "*batch Tt"], drows: Float[Array, "*batch Tt D"], length: int
) -> Float[Array, "{length} D"]:
    """The gradient of this PE's `length` rows of the table, in float32."""
    index = _local_index(tokens, length)
    zeros = jnp.zeros((length, drows.shape[-1]), jnp.float32)
    return zeros.at[index].add(drows.astype(jnp.float32), mode="drop", wrap_negative_indices=False)


def _local_index(tokens: Integer[Array, "*batch Tt"], length: int) -> Integer[Array, "*batch Tt"]:
    return tokens - fabric.axis_index(COLS) * length


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, inline=True)
def _local(
    tokens: Integer[Array, "*batch T"], table: Float[Array, "V D"]
) -> Float[Array, "*batch T D"]:
    # Look up in float32, so that the gradient is summed in it.
    table32 = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    rows = table32.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(table.dtype)


def _check(tokens: Shaped[Array, "..."], table: Shaped[Array, "..."]) -> None:
    if table.ndim != 2:
        raise ValueError(
            f"embedding: table is {table.shape}, it must have two dimensions: vocabulary, features"
        )
    if tokens.ndim < 1:
        raise ValueError("embedding: tokens is a single number; give it one dimension or more")
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"embedding: tokens is {tokens.dtype}; cast it to an integer dtype")
    if not jnp.issubdtype(table.dtype, jnp.floating):
        raise ValueError(f"embedding: table is {table.dtype}; cast it to a floating dtype")
