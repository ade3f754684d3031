"""This file is embedding lookup in a table whose vocabulary is split along x.

M. Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models Using Model
Parallelism", 2019, section 3, for a table split over the vocabulary; here its features are split
along y as well, as those of an output head transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Integer

from wsekern import fabric
from wsekern.wafer import context, layout
from wsekern.wafer.axes import COLS, ROWS, WAFERS
from wsekern.wafer.wafer import Wafer

_TABLE = P(COLS, ROWS)


def embedding(
    tokens: Integer[Array, "*batch T"], table: Float[Array, "V D"], *, wafer: Wafer | None = None
) -> Float[Array, "*batch T D"]:
    """`table[tokens]`, tiled: rows along y, features along x.

    Each PE looks up what lies in its own part of the vocabulary. Whichever is less moves along y:
    the table, whose tiles are gathered to V / width rows of all features, or the tokens, all of
    whose partial rows come back by an all-to-all. One reduce-scatter along x then sums the partial
    rows onto their features; with them a PE holds width times its part of the result. The gradient
    takes the same way back, scatters into float32 and is summed over the wafers. Reverse mode only.

    Args:
      tokens: rows of the table to take, along y, the first leading dimension over the wafers. A
        token outside 0 to V - 1 gives a row of NaN, and no gradient.
      table: one row a token, laid out `P("x", "y")`: an output head's `P("y", "x")`, transposed.
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
def _embedding(tokens, table, logical, wafer):
    return _fwd(tokens, table, logical, wafer)[0]


# Plain autodiff would scatter in the table's dtype, which may be too short to sum in.
def _fwd(tokens, table, logical, wafer):
    rows, tiled = layout.tiled(tokens.ndim, ROWS), layout.tiled(tokens.ndim + 1)
    kernel = functools.partial(_per_pe, logical=logical)
    out = wafer.map(kernel, in_specs=(rows, _TABLE), out_specs=tiled)(tokens, table)
    return out, (tokens, table)


def _bwd(logical, wafer, residuals, dout):
    tokens, table = residuals
    rows, tiled = layout.tiled(tokens.ndim, ROWS), layout.tiled(dout.ndim)
    kernel = functools.partial(_gradient_per_pe, logical=logical)
    run = wafer.map(kernel, in_specs=(rows, _TABLE, tiled), out_specs=_TABLE)
    return None, run(tokens, table, dout)


_embedding.defvjp(_fwd, _bwd)


def _per_pe(
    tokens: Integer[Array, "*batch Tt"], table: Float[Array, "Vt Dy"], logical: tuple[int, int]
) -> Float[Array, "*batch Tt Dx"]:
    V, D = logical
    mine = tokens
    if _table_moves(tokens, table):
        rows = _looked_up(mine, fabric.all_gather(table, ROWS, 1))
    else:
        every = fabric.all_gather(mine, ROWS, mine.ndim - 1)
        rows = fabric.all_to_all(_looked_up(every, table), ROWS, mine.ndim - 1, mine.ndim)
    rows = layout.resize(rows, -1, -(-D // fabric.axis_size(COLS)) * fabric.axis_size(COLS))
    rows = fabric.reduce_scatter(rows, COLS, mine.ndim)
    known = (tokens >= 0) & (tokens < V)
    return jnp.where(known[..., None], rows, jnp.nan)


def _gradient_per_pe(
    tokens: Integer[Array, "*batch Tt"],
    table: Float[Array, "Vt Dy"],
    dout: Float[Array, "*batch Tt Dx"],
    logical: tuple[int, int],
) -> Float[Array, "Vt Dy"]:
    drows = fabric.all_gather(dout, COLS, tokens.ndim)
    drows = layout.resize(drows, -1, table.shape[1] * fabric.axis_size(ROWS))
    if _table_moves(tokens, table):
        dtable = fabric.reduce_scatter(_scattered(tokens, drows, table.shape[0]), ROWS, 1)
    else:
        every = fabric.all_gather(tokens, ROWS, tokens.ndim - 1)
        drows = fabric.all_to_all(drows, ROWS, tokens.ndim, tokens.ndim - 1)
        dtable = _scattered(every, drows, table.shape[0])
    # Tokens without a leading dimension are replicated over the wafers, and so is their gradient.
    dtable = fabric.all_reduce(dtable, WAFERS) if tokens.ndim > 1 else dtable
    return dtable.astype(table.dtype)


def _table_moves(tokens, table):
    """Whether gathering the table along y moves less than sending back the partial rows."""
    return table.shape[0] <= tokens.size


def _looked_up(tokens, table):
    """Rows of this PE's part of the vocabulary; zeros for tokens that lie in another part."""
    return table.at[_places(tokens, table.shape[0])].get(
        mode="fill", fill_value=0, wrap_negative_indices=False
    )


def _scattered(tokens, drows, length):
    places = _places(tokens, length)
    zeros = jnp.zeros((length, drows.shape[-1]), jnp.float32)
    return zeros.at[places].add(drows.astype(jnp.float32), mode="drop", wrap_negative_indices=False)


def _places(tokens, length):
    return tokens - fabric.axis_index(COLS) * length


# Jitted, so that a call outside jit is one program; inlined, so that inside it adds nothing.
@functools.partial(jax.jit, inline=True)
def _local(tokens, table):
    # Looked up in float32, so that the gradient is scattered in it.
    whole = table.astype(jnp.promote_types(table.dtype, jnp.float32))
    rows = whole.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(table.dtype)


def _check(tokens, table):
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
