"""Fast reverse-mode rules for `slice` and `dynamic_update_slice`; per PE.

Plain autodiff puts each slice's cotangent into an array of zeros by `lax.pad`, and XLA then asks
for every cell whether it lies in the padding. Here a cell gathers its cotangents by slices, and the
cotangents of a few cells are added in place. These rules support reverse mode only.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, Shaped

from wsekern.kernels.stencil.buffers import Mode, Tile, ends
from wsekern.wafer import context

Window = tuple[tuple[int, ...], tuple[int, ...]]  # where a slice starts and ends
Starts = tuple[tuple[int, ...] | None, ...]  # where a slab is written into each buffer, if it is
MakeSlabs = Callable[..., Sequence[Tile]]


def apply_gathering(
    function: Callable[..., Sequence[Tile]],
    fields: Sequence[Tile],
    coefficients: Sequence[Tile],
) -> tuple[list[Tile], list[Tile]]:
    """`function(*fields, *coefficients)`, and the coefficients again.

    Args:
      function: the slices without strides that it takes off its operands are differentiated by the
        rules of this module; everything else as usual.
      fields: each of their cells gathers its cotangents from the slices.
      coefficients: the slices' cotangents are added to theirs in place. Pass what came back to the
        next call, so that many calls add up in one array.
    """
    operands = [*fields, *coefficients]
    sliced = _separate_slices(jax.make_jaxpr(function)(*operands))
    cuts = []
    # A field has one use in a step, so its cotangents are gathered there and then. A coefficient is
    # used in every step, and its cotangents add up in one array over all of them.
    passed_on = list(coefficients)
    for i, windows in enumerate(sliced.windows):
        if i < len(fields):
            cuts += _cut_windows(fields[i], fields[i].shape, windows)
        else:
            j = i - len(fields)
            passed_on[j], views = _cut_and_pass_on(passed_on[j], windows)
            cuts += views
    return sliced.compute(operands, cuts), passed_on


def write_slabs(
    buffers: Sequence[Tile],
    make: MakeSlabs,
    starts: Sequence[Sequence[int] | None],
    *,
    mode: Mode,
) -> list[Tile]:
    """The buffers, with the slabs that `make(*buffers)` returns written into them.

    Args:
      buffers: as they are before.
      make: cuts, moves and computes the slabs.
      starts: where each buffer's slab is written; None for a buffer that is only read, and has no
        slab.
      mode: REVERSE differentiates by the rules of this module.
    """
    places = tuple(None if start is None else tuple(start) for start in starts)
    if mode is Mode.REVERSE:
        return _write_slabs(list(buffers), make, places)
    return _update_slices(buffers, make(*buffers), places)


def windows_read(closed: core.ClosedJaxpr) -> tuple[tuple[Window, ...], ...]:
    """The slices that a jaxpr takes off each floating operand; all of it if it uses it whole."""
    return _separate_slices(closed).windows


class _Sliced(NamedTuple):
    """A function, separated into the slices that it takes and what it computes of them."""

    windows: tuple[tuple[Window, ...], ...]  # of each operand; none for integers
    compute: Callable[[Sequence[Tile], Sequence[Tile]], list[Tile]]  # of operands and slices


def _separate_slices(closed: core.ClosedJaxpr) -> _Sliced:
    """The slices of a jaxpr's operands, and the jaxpr without them.

    For `v = u[1:]; w = v[:-1]; return w * u[2:]` with 5 cells in `u`, the windows of `u` are
    `(1, 4)` and `(2, 5)`, and what is left is `multiply`.
    """
    jaxpr = closed.jaxpr
    # The variables that are a window of an operand: the operand, a slice, or a slice of a slice.
    window_of: dict[core.Var, tuple[int, Window]] = {
        variable: (i, ((0,) * variable.aval.ndim, variable.aval.shape))
        for i, variable in enumerate(jaxpr.invars)
        if jnp.issubdtype(variable.aval.dtype, jnp.floating)
    }
    equations = []
    for equation in jaxpr.eqns:
        window = _window(equation, window_of)
        if window is None:
            equations.append(equation)
        else:
            window_of[equation.outvars[0]] = window
    read = [*(v for e in equations for v in e.invars), *jaxpr.outvars]
    variables = dict.fromkeys(v for v in read if not hasattr(v, "val"))  # in order, each once
    views = [v for v in variables if v in window_of]
    windows = tuple(
        tuple(dict.fromkeys(window for v in views for j, window in [window_of[v]] if j == i))
        for i in range(len(jaxpr.invars))
    )
    # Two variables may be the same window, which is then cut once.
    order = [(i, window) for i, several in enumerate(windows) for window in several]
    places = [order.index(window_of[v]) for v in views]
    whole = [i for i, v in enumerate(jaxpr.invars) if v not in window_of]
    without_slices = jaxpr.replace(
        invars=[*(jaxpr.invars[i] for i in whole), *views],
        eqns=equations,
        debug_info=jaxpr.debug_info._replace(arg_names=None),
    )
    run = core.jaxpr_as_fun(core.ClosedJaxpr(without_slices, closed.consts))

    def compute(operands: Sequence[Tile], cuts: Sequence[Tile]) -> list[Tile]:
        return run(*(operands[i] for i in whole), *(cuts[place] for place in places))

    return _Sliced(windows, compute)


def _window(
    equation: core.JaxprEqn, window_of: dict[core.Var, tuple[int, Window]]
) -> tuple[int, Window] | None:
    """The operand and the window of it that an equation cuts, if that is all it does."""
    if equation.primitive.name != "slice" or hasattr(equation.invars[0], "val"):
        return None
    if equation.invars[0] not in window_of or set(equation.params["strides"] or [1]) != {1}:
        return None
    i, (begin, _) = window_of[equation.invars[0]]
    low, high = (
        tuple(a + b for a, b in zip(begin, equation.params[limits], strict=True))
        for limits in ("start_indices", "limit_indices")
    )
    return i, (low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cut_windows(array: Tile, shape: tuple[int, ...], windows: tuple[Window, ...]) -> list[Tile]:
    del shape
    return [lax.slice(array, *window) for window in windows]


# The module docstring says why: plain autodiff would pad every window's cotangent.
def _cut_windows_fwd(
    array: Tile, shape: tuple[int, ...], windows: tuple[Window, ...]
) -> tuple[list[Tile], None]:
    return _cut_windows(array, shape, windows), None


def _cut_windows_bwd(
    shape: tuple[int, ...], windows: tuple[Window, ...], _: None, cotangents: Sequence[Tile]
) -> tuple[Tile | None]:
    dims = range(len(shape))
    lead = [max(low[d] for low, _ in windows) for d in dims]
    trail = [max(shape[d] - high[d] for _, high in windows) for d in dims]
    parts = []
    for (low, _high), cotangent in zip(windows, cotangents, strict=True):
        padded_shape = [lead[d] + cotangent.shape[d] + trail[d] for d in dims]
        # Written into zeros: XLA would fuse a pad into the sum, with a test for every cell.
        zeros = jnp.zeros(padded_shape, cotangent.dtype)
        padded = lax.dynamic_update_slice(zeros, cotangent, lead)
        begin = [lead[d] - low[d] for d in dims]
        parts.append(lax.slice(padded, begin, ends(begin, shape)))
    return (functools.reduce(operator.add, parts) if parts else None,)


_cut_windows.defvjp(_cut_windows_fwd, _cut_windows_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut_and_pass_on(array: Tile, windows: tuple[Window, ...]) -> tuple[Tile, list[Tile]]:
    return array, [lax.slice(array, *window) for window in windows]


# Many steps read one coefficient. As it is passed on from step to step, so is its cotangent, from
# the last step to the first, and every step adds to it in place.
def _cut_and_pass_on_fwd(
    array: Tile, windows: tuple[Window, ...]
) -> tuple[tuple[Tile, list[Tile]], None]:
    return _cut_and_pass_on(array, windows), None


def _cut_and_pass_on_bwd(
    windows: tuple[Window, ...], _: None, cotangents: tuple[Tile, Sequence[Tile]]
) -> tuple[Tile]:
    total, parts = cotangents
    return (_add_slices(total, windows, parts),)


_cut_and_pass_on.defvjp(_cut_and_pass_on_fwd, _cut_and_pass_on_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _write_slabs(buffers: list[Tile], make: MakeSlabs, starts: Starts) -> list[Tile]:
    return _update_slices(buffers, make(*buffers), starts)


# The cotangent of cells that were overwritten is cleared in place; those of cells that were read
# are added in place.
def _write_slabs_fwd(
    buffers: list[Tile], make: MakeSlabs, starts: Starts
) -> tuple[list[Tile], tuple[Any, "_SlabShapes"]]:
    with context.differentiating():
        sliced = _separate_slices(jax.make_jaxpr(make)(*buffers))
        cuts = [
            lax.slice(buffer, *window)
            for buffer, windows in zip(buffers, sliced.windows, strict=True)
            for window in windows
        ]
        slabs, pull = jax.vjp(functools.partial(_compute_of, sliced, buffers), *cuts)
    shapes = _SlabShapes(sliced.windows, tuple(slab.shape for slab in slabs))
    return _update_slices(buffers, slabs, starts), (pull, shapes)


def _write_slabs_bwd(
    make: MakeSlabs,
    starts: Starts,
    residuals: tuple[Any, "_SlabShapes"],
    cotangents: Sequence[Shaped[Array | np.ndarray, "..."]],
) -> tuple[list[Any]]:
    pull, static = residuals
    slab_cotangents: list[Any] = []
    results: list[Any] = []
    shapes = iter(static.slabs)
    for cotangent, start in zip(cotangents, starts, strict=True):
        # JAX gives integers, such as a mask, a cotangent of dtype float0.
        integer = cotangent.dtype == jax.dtypes.float0
        if start is not None:
            shape = next(shapes)
            if integer:
                slab_cotangents.append(np.zeros(shape, jax.dtypes.float0))
            else:
                slab_cotangents.append(lax.slice(cotangent, start, ends(start, shape)))
                zeros = jnp.zeros(shape, cotangent.dtype)
                cotangent = lax.dynamic_update_slice(cotangent, zeros, start)
        results.append(None if integer else cotangent)
    # After clearing: a cell that was read before it was overwritten keeps the read's cotangent.
    parts = list(pull(slab_cotangents))
    for i, windows in enumerate(static.windows):
        if windows:
            results[i] = _add_slices(results[i], windows, parts[: len(windows)])
            del parts[: len(windows)]
    return (results,)


_write_slabs.defvjp(_write_slabs_fwd, _write_slabs_bwd)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=(), meta_fields=("windows", "slabs")
)
@dataclasses.dataclass(frozen=True)
class _SlabShapes:
    """What the forward pass knows statically and the backward pass needs."""

    windows: tuple[tuple[Window, ...], ...]
    slabs: tuple[tuple[int, ...], ...]


def _compute_of(sliced: _Sliced, operands: Sequence[Tile], *cuts: Tile) -> list[Tile]:
    return sliced.compute(operands, cuts)


def _update_slices(buffers: Sequence[Tile], slabs: Sequence[Tile], starts: Starts) -> list[Tile]:
    remaining = iter(slabs)
    return [
        buffer if start is None else lax.dynamic_update_slice(buffer, next(remaining), start)
        for buffer, start in zip(buffers, starts, strict=True)
    ]


def _add_slices(array: Tile, windows: Sequence[Window], parts: Sequence[Tile]) -> Tile:
    for window, part in zip(windows, parts, strict=True):
        total = lax.slice(array, *window) + part
        array = lax.dynamic_update_slice(array, total, window[0])
    return array
