"""This file is the matrix product: `matmul`, its gradient, and which algorithm serves where."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wsekern import context, fabric, layout
from wsekern.axes import WAFERS
from wsekern.kernels import allgather, cannon, summa
from wsekern.wafer import Wafer

Algorithm = Literal["auto", "allgather", "summa", "cannon", "mesh"]


class _Kernels(NamedTuple):
    forward: Callable
    backward: Callable
    square: bool  # whether it needs as many rows of PEs as columns


def _cannon(ring: fabric.Ring) -> _Kernels:
    forward, backward = (functools.partial(f, ring=ring) for f in (cannon.forward, cannon.backward))
    return _Kernels(forward, backward, square=True)


_ALGORITHMS = {
    "allgather": _Kernels(allgather.forward, allgather.backward, square=False),
    "summa": _Kernels(summa.forward, summa.backward, square=False),
    "cannon": _cannon("plain"),
    "mesh": _cannon("folded"),
}


@overload
def matmul(
    a: Float[Array, "*batch M K"],
    b: Float[Array, "... K N"],
    *,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> Float[Array, "*batch M N"]: ...


@overload
def matmul(
    a: Float[Array, "*batch M K"],
    b: tuple[Float[Array, "... K _"], ...],
    *,
    algorithm: Algorithm = "auto",
    wafer: Wafer | None = None,
) -> tuple[Float[Array, "*batch M _"], ...]: ...


def matmul(a, b, *, algorithm="auto", wafer=None):
    """`a @ b`; of a tuple of right factors, the tuple of products.

    Products that share their left factor (query, key and value; gate and up) are best asked for in
    one call: `a` then moves once, and the right factors move as one. Products are summed in float32
    and returned in the operands' dtype. The gradient takes the same algorithm and keeps nothing
    but the operands. Reverse mode only.

    On a height x width grid, with words of `a` and `b` counted for the tiles of one PE:

    - `allgather`: `width` times the tile of `a` and `height` times that of `b` are received, in two
      moves, and held; the gradient holds as many sums in float32.
    - `summa`: about twice as many words, in 2 max(height, width) broadcasts, of which one panel
      each is held.
    - `cannon`, on square grids: as many words as `allgather`, in 2 (height - 1) shifts after a
      skew; two tiles of each operand are held. A wafer has edges: its wrap is as long as the grid.
    - `mesh`: Cannon's shifts on a ring folded onto the line: no word goes further than two hops.

    Args:
      a: left factor, laid out `P("y", "x")`; leading dimensions, if any, `P("wafer", None, ...)`.
      b: right factor, laid out likewise: a matrix, the same for all leading dimensions of `a`, or
        one with these leading dimensions; or a tuple of either.
      algorithm: one of these, or "auto": `allgather` while what it gathers on a PE is no more than
        8 MiB on emulated devices, a 64th of an accelerator's memory, or a quarter of a wafer's
        SRAM. Beyond that `summa`; on the square grid of a wafer (virtual, abstract) `mesh`.
      wafer: where to run; by default the current wafer, and `jnp.matmul` without one.

    Raises:
      ValueError: the shapes do not fit one another, the dtypes differ or are not floating, or
        `algorithm` is unknown or needs a square grid.
    """
    several = isinstance(b, tuple | list)
    a, bs = jnp.asarray(a), tuple(map(jnp.asarray, b if several else (b,)))
    _check(a, bs, algorithm)
    wafer = context.resolve(wafer)
    if wafer is None:
        cs = tuple(jnp.matmul(a, one) for one in bs)
    else:
        spec = layout.tiled(a.ndim)
        padded = tuple(layout.pad(one, layout.tiled(one.ndim), wafer) for one in bs)
        a_padded = layout.pad(a, spec, wafer)
        cs = _product(a_padded, padded, _chosen(algorithm, a_padded, padded, wafer), wafer)
        shapes = [(*a.shape[:-1], one.shape[-1]) for one in bs]
        cs = tuple(layout.crop(c, shape, spec, wafer) for c, shape in zip(cs, shapes, strict=True))
    return cs if several else cs[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(a, bs, algorithm, wafer):
    a_spec, b_specs = layout.tiled(a.ndim), tuple(layout.tiled(b.ndim) for b in bs)
    kernel = functools.partial(_per_pe, forward=_ALGORITHMS[algorithm].forward)
    run = wafer.map(kernel, in_specs=(a_spec, b_specs), out_specs=(a_spec,) * len(bs))
    return run(a, bs)


# Plain autodiff would keep what was gathered.
def _fwd(a, bs, algorithm, wafer):
    return _product(a, bs, algorithm, wafer), (a, bs)


def _bwd(algorithm, wafer, residuals, dcs):
    a, bs = residuals
    a_spec, b_specs = layout.tiled(a.ndim), tuple(layout.tiled(b.ndim) for b in bs)
    kernel = functools.partial(_per_pe_gradients, backward=_ALGORITHMS[algorithm].backward)
    in_specs = (a_spec, b_specs, (a_spec,) * len(bs))
    return wafer.map(kernel, in_specs=in_specs, out_specs=(a_spec, b_specs))(a, bs, dcs)


_product.defvjp(_fwd, _bwd)


def _per_pe(
    a: Float[Array, "*batch Mt Kt"],
    bs: tuple[Float[Array, "... Kb _"], ...],
    forward: Callable,
) -> tuple[Float[Array, "*batch Mt _"], ...]:
    return _apart(forward(a, _together(bs)).astype(a.dtype), bs)


def _per_pe_gradients(
    a: Float[Array, "*batch Mt Kt"],
    bs: tuple[Float[Array, "... Kb _"], ...],
    dcs: tuple[Float[Array, "*batch Mt _"], ...],
    backward: Callable,
) -> tuple[Float[Array, "*batch Mt Kt"], tuple[Float[Array, "... Kb _"], ...]]:
    b = _together(bs)
    da, db = backward(a, b, _together(dcs))
    if a.ndim > 2 and b.ndim == 2:
        db = fabric.all_reduce(db, WAFERS)  # every wafer has the same weights, and other rows
    return da.astype(a.dtype), _apart(db.astype(a.dtype), bs)


def _together(tiles: tuple[jax.Array, ...]) -> jax.Array:
    return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, -1)


def _apart(joined: jax.Array, like: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    ends = [0]
    for one in like:
        ends.append(ends[-1] + one.shape[-1])
    return tuple(joined[..., i:j] for i, j in zip(ends, ends[1:], strict=False))


def algorithms(wafer: Wafer) -> tuple[str, ...]:
    """The algorithms that serve the grid of `wafer`."""
    return tuple(
        name for name, k in _ALGORITHMS.items() if wafer.height == wafer.width or not k.square
    )


def _chosen(algorithm, a, bs, wafer):
    if algorithm == "auto":
        gathered = _tile_bytes(a, wafer) * wafer.width
        gathered += sum(_tile_bytes(b, wafer) for b in bs) * wafer.height
        if allgather.fits(gathered, wafer):
            return "allgather"
        return "mesh" if wafer.machine and wafer.height == wafer.width else "summa"
    if algorithm not in algorithms(wafer):
        raise ValueError(
            f"matmul: algorithm={algorithm!r} needs a square grid, it is {wafer.height}x"
            f"{wafer.width}; use one of {algorithms(wafer)}"
        )
    return algorithm


def _tile_bytes(x, wafer):
    return x.size * x.dtype.itemsize // layout.parts(layout.tiled(x.ndim), wafer)


def _check(a, bs, algorithm):
    if not bs:
        raise ValueError("matmul: b is an empty tuple; give at least one right factor")
    for b in bs:
        _check_pair(a, b)
    if algorithm != "auto" and algorithm not in _ALGORITHMS:
        known = ", ".join(repr(name) for name in ("auto", *_ALGORITHMS))
        raise ValueError(f"matmul: algorithm={algorithm!r} is not one of {known}")


def _check_pair(a, b):
    for name, x in (("a", a), ("b", b)):
        if x.ndim < 2:
            raise ValueError(
                f"matmul: {name} is {x.shape}, it must have at least two dimensions; give a "
                "vector a row or a column of its own"
            )
    if b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        raise ValueError(
            f"matmul: a is {a.shape} and b is {b.shape}: b must be a matrix, or have a's leading "
            f"dimensions {a.shape[:-2]}"
        )
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"matmul: a is {a.shape} and b is {b.shape}: a's columns ({a.shape[-1]}) must equal "
            f"b's rows ({b.shape[-2]})"
        )
    if a.dtype != b.dtype:
        raise ValueError(f"matmul: a is {a.dtype} and b is {b.dtype}: cast one of them first")
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise ValueError(f"matmul: a and b are {a.dtype}; cast them to a floating dtype")
