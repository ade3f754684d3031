"""This file is the adjoint of an update, as fast as the update: cells gather what they are owed.

Plain autodiff adds up one padded cotangent for each slice that an update takes of a field, and XLA
then asks of every cell whether it lies in the padding. Here each cotangent is laid into zeros wide
enough that every cell finds its summands by slices, as in the update itself.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

Windows = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # starts and ends of each slice


def gathering(update: Callable[..., Any], *operands: Any) -> Any:
    """`update(*operands)`, for reverse mode alone.

    Args:
      update: what it slices off an operand, at its top level and without strides, is gathered back;
        whatever else it does is differentiated as ever.
      operands: pytrees of arrays.
    """
    leaves, tree = jax.tree.flatten(operands)
    closed, shape = jax.make_jaxpr(
        lambda *leaves: update(*jax.tree.unflatten(tree, leaves)), return_shape=True
    )(*leaves)
    out = _evaluated(closed, leaves)
    return jax.tree.unflatten(jax.tree.structure(shape), out)


def _evaluated(closed: Any, leaves: Sequence[jax.Array]) -> list[Any]:
    jaxpr = closed.jaxpr
    cut: dict[Any, jax.Array] = {}  # what each slice makes
    for variable, array in zip(jaxpr.invars, leaves, strict=True):
        slices = [e for e in jaxpr.eqns if _slices(e, variable)]
        windows = [(e.params["start_indices"], e.params["limit_indices"]) for e in slices]
        different = tuple(dict.fromkeys(windows))
        if different:
            views = dict(zip(different, _views(array, array.shape, different), strict=True))
            cut |= {
                e.outvars[0]: views[window] for e, window in zip(slices, windows, strict=True)
            }
    # What is left is a function of the slices besides.
    rest = jaxpr.replace(
        invars=[*jaxpr.invars, *cut],
        eqns=[e for e in jaxpr.eqns if e.outvars[0] not in cut],
        debug_info=jaxpr.debug_info._replace(arg_names=None),
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(rest, closed.consts))(*leaves, *cut.values())


def _slices(equation: Any, variable: Any) -> bool:
    if equation.primitive.name != "slice" or equation.invars[0] is not variable:
        return False
    return equation.params["strides"] is None and jnp.issubdtype(variable.aval.dtype, jnp.floating)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _views(array: jax.Array, shape: tuple[int, ...], windows: Windows) -> list[jax.Array]:
    del shape
    return [lax.slice(array, low, high) for low, high in windows]


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
        # Written in place into zeros: a pad would be fused into the sum, and asked cell by cell.
        laid = lax.dynamic_update_slice(jnp.zeros(wide, cotangent.dtype), cotangent, lead)
        begin = [lead[d] - low[d] for d in dims]
        part = lax.slice(laid, begin, [begin[d] + shape[d] for d in dims])
        total = part if total is None else total + part
    return (total,)


_views.defvjp(_views_fwd, _views_bwd)
