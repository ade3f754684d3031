"""This file is adjoints of slices and of writes in place that are as fast as these; per PE.

Plain autodiff lays each slice's cotangent into an array of zeros by `lax.pad`, and XLA then asks of
every cell whether it lies in the padding. Here a cell gathers what it is owed by slices, and what
few cells owe is added in place. Reverse mode alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from wsekern.wafer import context

Window = tuple[tuple[int, ...], tuple[int, ...]]  # where a slice starts and ends


def gathering(
    function: Callable[..., Sequence[jax.Array]],
    fields: Sequence[jax.Array],
    held: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array]]:
    """`function(*fields, *held)`, and `held` again.

    Args:
      function: what it slices off its operands, without strides, is differentiated as said above;
        whatever else it does, as ever.
      fields: whose cells gather their cotangents.
      held: to whose cotangents those of the slices are added in place. Call after call, pass on
        what came back.
    """
    taken = _taken(function, [*fields, *held])
    cuts = []
    held = list(held)
    for i, windows in enumerate(taken.windows):
        if i < len(fields):
            cuts += _views(fields[i], fields[i].shape, windows)
        else:
            held[i - len(fields)], views = _views_beside(held[i - len(fields)], windows)
            cuts += views
    return taken.rest(*cuts), held


def writing(
    buffers: Sequence[jax.Array],
    make: Callable[..., Sequence[jax.Array]],
    starts: Sequence[Sequence[int] | None],
    *,
    backward: bool,
) -> list[jax.Array]:
    """The buffers, with a slab each of `make(*buffers)` written from where `starts` says.

    Args:
      buffers: as they are before.
      make: cuts, moves and computes the slabs.
      starts: None for a buffer that is only read, for which there is no slab.
      backward: whether it is for reverse mode alone, and as said above.
    """
    places = tuple(None if start is None else tuple(start) for start in starts)
    if backward:
        return _writing(list(buffers), make, places)
    return _with(buffers, make(*buffers), places)


def windows(
    function: Callable[..., Any], operands: Sequence[Any]
) -> tuple[tuple[Window, ...], ...]:
    """What `function` slices off each of its floating operands; of one it uses otherwise, all."""
    return _taken(function, operands).windows


class _Taken(NamedTuple):
    """A function of arrays as one of what it takes of them."""

    windows: tuple[tuple[Window, ...], ...]  # of each operand; of whole numbers none
    rest: Callable[..., list[jax.Array]]


def _taken(function: Callable, operands: Sequence[Any]) -> _Taken:
    closed = jax.make_jaxpr(function)(*operands)
    jaxpr = closed.jaxpr
    # Of which operand a variable is which window: itself, a slice, or a slice of a slice.
    of: dict[Any, tuple[int, Window]] = {
        variable: (i, ((0,) * array.ndim, array.shape))
        for i, (variable, array) in enumerate(zip(jaxpr.invars, operands, strict=True))
        if jnp.issubdtype(array.dtype, jnp.floating)
    }
    kept = []
    for equation in jaxpr.eqns:
        window = _window(equation, of)
        if window is None:
            kept.append(equation)
        else:
            of[equation.outvars[0]] = window
    read = [*(v for e in kept for v in e.invars), *jaxpr.outvars]
    views = [v for v in dict.fromkeys(v for v in read if not hasattr(v, "val")) if v in of]
    windows = tuple(
        tuple(dict.fromkeys(window for v in views for j, window in [of[v]] if j == i))
        for i in range(len(operands))
    )
    order = [(i, window) for i, own in enumerate(windows) for window in own]
    places = [order.index(of[v]) for v in views]
    whole = [v for v in jaxpr.invars if v not in of]
    rest = jaxpr.replace(
        invars=[*whole, *views],
        eqns=kept,
        debug_info=jaxpr.debug_info._replace(arg_names=None),
    )
    run = core.jaxpr_as_fun(core.ClosedJaxpr(rest, closed.consts))
    given = [array for v, array in zip(jaxpr.invars, operands, strict=True) if v not in of]
    return _Taken(windows, lambda *cuts: run(*given, *(cuts[place] for place in places)))


def _window(equation: Any, of: dict[Any, tuple[int, Window]]) -> tuple[int, Window] | None:
    """Of which operand an equation takes which window, if that is all it does."""
    if equation.primitive.name != "slice" or hasattr(equation.invars[0], "val"):
        return None
    if equation.invars[0] not in of or set(equation.params["strides"] or [1]) != {1}:
        return None
    i, (begin, _) = of[equation.invars[0]]
    low, high = (
        tuple(a + b for a, b in zip(begin, equation.params[which], strict=True))
        for which in ("start_indices", "limit_indices")
    )
    return i, (low, high)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _views(array, shape, windows):
    del shape
    return [lax.slice(array, *window) for window in windows]


# For the reason that the file begins with.
def _views_fwd(array, shape, windows):
    return _views(array, shape, windows), None


def _views_bwd(shape, windows, _, cotangents):
    dims = range(len(shape))
    lead = [max(low[d] for low, _ in windows) for d in dims]
    trail = [max(shape[d] - high[d] for _, high in windows) for d in dims]
    total = None
    for (low, _), cotangent in zip(windows, cotangents, strict=True):
        wide = [lead[d] + cotangent.shape[d] + trail[d] for d in dims]
        # Written into zeros: a pad would be fused into the sum, and asked cell by cell.
        laid = lax.dynamic_update_slice(jnp.zeros(wide, cotangent.dtype), cotangent, lead)
        begin = [lead[d] - low[d] for d in dims]
        part = lax.slice(laid, begin, [begin[d] + shape[d] for d in dims])
        total = part if total is None else total + part
    return (total,)


_views.defvjp(_views_fwd, _views_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _views_beside(array, windows):
    return array, [lax.slice(array, *window) for window in windows]


# Of what many steps read, cotangents add up in one array.
def _views_beside_fwd(array, windows):
    return _views_beside(array, windows), None


def _views_beside_bwd(windows, _, cotangents):
    total, parts = cotangents
    return (_added(total, windows, parts),)


_views_beside.defvjp(_views_beside_fwd, _views_beside_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _writing(buffers, make, starts):
    return _with(buffers, make(*buffers), starts)


# The cotangent of what was overwritten is cleared, those of what was read are added, in place.
def _writing_fwd(buffers, make, starts):
    with context.differentiating():
        taken = _taken(make, buffers)
        cuts = [
            lax.slice(b, *window)
            for b, own in zip(buffers, taken.windows, strict=True)
            for window in own
        ]
        slabs, pull = jax.vjp(taken.rest, *cuts)
    known = _Known(taken.windows, tuple(slab.shape for slab in slabs))
    return _with(buffers, slabs, starts), (pull, known)


def _writing_bwd(make, starts, residuals, cotangents):
    pull, known = residuals
    owed: list[Any] = []
    out, left = [], iter(known.shapes)
    for cotangent, start in zip(cotangents, starts, strict=True):
        whole = cotangent.dtype == jax.dtypes.float0  # a whole number's
        if start is not None:
            shape = next(left)
            end = [a + b for a, b in zip(start, shape, strict=True)]
            if whole:
                owed.append(np.zeros(shape, jax.dtypes.float0))
            else:
                owed.append(lax.slice(cotangent, start, end))
                nothing = jnp.zeros(shape, cotangent.dtype)
                cotangent = lax.dynamic_update_slice(cotangent, nothing, start)
        out.append(None if whole else cotangent)
    parts = list(pull(owed))
    for i, own in enumerate(known.windows):
        out[i], parts = _added(out[i], own, parts[: len(own)]), parts[len(own) :]
    return (out,)


_writing.defvjp(_writing_fwd, _writing_bwd)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=(), meta_fields=("windows", "shapes")
)
@dataclasses.dataclass(frozen=True)
class _Known:
    """What a pass back is told by the pass forward."""

    windows: tuple[tuple[Window, ...], ...]
    shapes: tuple[tuple[int, ...], ...]  # of the slabs


def _with(buffers, slabs, starts):
    left = iter(slabs)
    return [
        b if start is None else lax.dynamic_update_slice(b, next(left), start)
        for b, start in zip(buffers, starts, strict=True)
    ]


def _added(array, windows, parts):
    for window, part in zip(windows, parts, strict=True):
        sum_ = lax.slice(array, *window) + part
        array = lax.dynamic_update_slice(array, sum_, window[0])
    return array
