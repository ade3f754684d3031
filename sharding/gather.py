"""Bring the parameters of a split state to where they compute, one layer at a time."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from sharding.state import constrain, layout_of
from wsekern import fabric
from wsekern.hardware import TPU_V5P, TPU_V6E, accelerator
from wsekern.wafer.axes import WAFERS, axes_of
from wsekern.wafer.limits import keeps_shares
from wsekern.wafer.wafer import Wafer

# Their compiler waits for gathers. A v5e lets them go on in chains of fusions, and a TPU7x leaves
# them to its sparse cores. Seen in schedules of libtpu 0.0.52.
_WAITING = (TPU_V5P, TPU_V6E)


def gather(state: Any, wafer: Wafer, dtype: jax.typing.DTypeLike) -> Any:
    """`state`, which is split over the wafers, under jit; weights in `dtype` and whole on each.

    Their gradients go back to where the parameters live. On TPUs whose compiler waits for gathers,
    weights go around the ring of the wafers, in moves that it lets go on behind arithmetic. On
    other chips the state is laid out where it lives, and XLA gathers what computes.

    Args:
      state: of nnx variables that name their dimensions.
      wafer: where the state lies.
      dtype: that weights compute in.
    """
    state = constrain(state, wafer, "memoryx")
    if not _by_moves(wafer):
        return state
    bring = functools.partial(_bring, wafer=wafer, dtype=jnp.dtype(dtype))
    return jax.tree.map(bring, state, is_leaf=lambda v: isinstance(v, nnx.Variable))


def _by_moves(wafer: Wafer) -> bool:
    return keeps_shares(wafer) and accelerator(wafer.device_kind or "") in _WAITING


def _bring(leaf: nnx.Variable, wafer: Wafer, dtype: jnp.dtype) -> nnx.Variable:
    value, home = leaf.get_value(), layout_of(leaf, "memoryx")
    split = [d for d, entry in enumerate(home) if WAFERS in axes_of(entry)]
    if home == layout_of(leaf) or not split:
        return leaf
    parts = [math.prod(map(wafer.axis_size, axes_of(entry))) for entry in home]
    if any(size % count for size, count in zip(value.shape, parts, strict=True)):
        return leaf  # XLA pads it
    specs = home, layout_of(leaf)
    return leaf.replace(_gathered(value, specs, split[0], dtype, value.dtype, wafer))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _gathered(
    value: Float[Array, "..."],
    specs: tuple[P, P],
    axis: int,
    dtype: jnp.dtype,
    parameter_dtype: jnp.dtype,
    wafer: Wafer,
) -> Float[Array, "..."]:
    kernel = functools.partial(fabric.ring_all_gather, along=WAFERS, axis=axis)
    home, spec = specs
    run = wafer.map(kernel, in_specs=home, out_specs=spec, replicated_by_construction=True)
    return run(value.astype(dtype))


def _fwd(value: Float[Array, "..."], *static: Any) -> tuple[Float[Array, "..."], None]:
    return _gathered(value, *static), None


def _bwd(
    specs: tuple[P, P],
    axis: int,
    dtype: jnp.dtype,
    parameter_dtype: jnp.dtype,
    wafer: Wafer,
    residuals: None,
    gradient: Float[Array, "..."],
) -> tuple[Float[Array, "..."]]:
    # Operations sum over the wafers by themselves, and leave each its share.
    home, _ = specs
    return (wafer.shard(gradient.astype(parameter_dtype), home),)


_gathered.defvjp(_fwd, _bwd)
