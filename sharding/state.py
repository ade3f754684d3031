"""Lay out a whole train state, pad it to what the wafer divides, and cut the padding off again.

A state is any pytree. Its arrays stand in nnx variables that name their dimensions (`axes`): the
parameters of a model, and the moments that an optimizer keeps of them. An array without names (a
step count) is whole on every PE.

JAX refuses an uneven array at the boundary of a jitted function, so a state is kept padded: each
dimension is rounded up to a multiple of the PEs along it, filled with zeros, and the variable
remembers its `logical_shape`, the shape without padding.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sharding.rules import Home, spec_of
from wsekern.wafer import context, layout, on_devices
from wsekern.wafer.axes import axes_of
from wsekern.wafer.wafer import Wafer


def lay_out(state: Any, wafer: Wafer | None, home: Home = "wafer") -> Any:
    """The sharding of every array of `state`, as a tree of its structure: for `out_shardings=`.

    Args:
      state: the state, or its shapes (`jax.eval_shape`).
      wafer: where the state goes; None for one device.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding_of(leaf: Any) -> Any:
        sharding = one_device if wafer is None else wafer.sharding(layout_of(leaf, home))
        return leaf.replace(sharding) if isinstance(leaf, nnx.Variable) else sharding

    return _map_leaves(sharding_of, state)


def unpadded_sharding(leaf: Any, wafer: Wafer | None) -> jax.sharding.Sharding:
    """The sharding of one leaf that is not padded: a dimension that does not divide stays whole.

    Args:
      leaf: an nnx variable, or an array.
      wafer: where it goes; None for one device.
    """
    if wafer is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = leaf.get_value().shape if isinstance(leaf, nnx.Variable) else leaf.shape
    entries = [
        entry if entry is None or size % wafer.axis_size(entry) == 0 else None
        for size, entry in zip(shape, tuple(layout_of(leaf)) + (None,) * len(shape), strict=False)
    ]
    return wafer.sharding(P(*entries))


def layout_of(leaf: Any, home: Home = "wafer") -> P:
    """The spec of one leaf of a state; `P()`, whole on every PE, if it names no dimensions.

    Args:
      leaf: an nnx variable, or an array.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """
    if not isinstance(leaf, nnx.Variable):
        return P()
    axes = leaf.get_metadata().get("axes")
    return P() if axes is None else spec_of(axes, home)


def initialize(make: Callable[[], Any], wafer: Wafer | None, home: Home = "wafer") -> Any:
    """`make()`, padded and laid out; no device ever holds a whole array.

    Each device computes its own part, and the values are the same on every wafer.

    Args:
      make: builds a state from nothing; it is traced inside `jax.jit`.
      wafer: where the state goes; None for one device.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """

    def build() -> Any:
        return pad(make(), wafer, home)

    return jax.jit(build, out_shardings=lay_out(jax.eval_shape(build), wafer, home))()


initialise = initialize  # the name in release 0.1; to go after release 0.2


def pad(state: Any, wafer: Wafer | None, home: Home = "wafer") -> Any:
    """`state` with every named array padded to what `wafer` divides; the logical shape is noted.

    Args:
      state: padded or not; what is padded already keeps its logical shape.
      wafer: the wafer to pad for; None pads nothing.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """

    def pad_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf
        value, shape = leaf.get_value(), logical_shape(leaf)
        padded = value if wafer is None else layout.pad(value, layout_of(leaf, home), wafer)
        return leaf.replace(padded, logical_shape=shape)

    return _map_leaves(pad_leaf, state)


def constrain(state: Any, wafer: Wafer, home: Home = "wafer") -> Any:
    """`state`, under jit, with every array and its gradient laid out where it lives.

    Dimensions that do not divide by the PEs along them are laid out as XLA sees fit.

    Args:
      state: of nnx variables that name their dimensions.
      wafer: where the state lies; on virtual PEs nothing is constrained.
      home: "wafer", or "memoryx" for a state that is split over the wafers.
    """
    if wafer.backend != "devices" or on_devices.explicit(wafer):
        return state  # Explicit arrays carry their layout in their type

    def constrain_leaf(leaf: nnx.Variable) -> nnx.Variable:
        value, spec = leaf.get_value(), layout_of(leaf, home)
        entries = [
            entry if size % math.prod(map(wafer.axis_size, axes_of(axes))) == 0 else P.UNCONSTRAINED
            for size, axes, entry in zip(value.shape, spec, wafer.mesh_spec(spec), strict=True)
        ]
        sharding = jax.sharding.NamedSharding(wafer.device_mesh, P(*entries))
        return leaf.replace(jax.lax.with_sharding_constraint(value, sharding))

    return _map_leaves(constrain_leaf, state)


def logical(state: Any) -> Any:
    """`state` without its padding: what a model computes with.

    Differentiable; the gradient of the padding is zero. On a wafer with Explicit axes, call it
    inside `with wafer:`.
    """
    wafer = context.current()

    def crop_leaf(leaf: Any) -> Any:
        shape = logical_shape(leaf)
        if shape == jnp.shape(leaf):
            return leaf
        value = leaf.get_value()
        if wafer is None:
            return leaf.replace(value[tuple(slice(0, n) for n in shape)])
        return leaf.replace(layout.crop(value, shape, layout_of(leaf), wafer))

    return _map_leaves(crop_leaf, state)


def logical_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of one leaf of a state without its padding."""
    if isinstance(leaf, nnx.Variable) and "logical_shape" in leaf.get_metadata():
        return tuple(leaf.get_metadata()["logical_shape"])
    return tuple(jnp.shape(leaf))


def logical_shapes(state: Any) -> Any:
    """`state` with every array replaced by its shape without padding."""

    def shape_of(leaf: Any) -> Any:
        shape = logical_shape(leaf)
        return leaf.replace(shape) if isinstance(leaf, nnx.Variable) else shape

    return _map_leaves(shape_of, state)


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves of `state`, nnx variables whole, by their path: `"params/blocks/norm/scale"`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _map_leaves(function: Callable[[Any], Any], state: Any) -> Any:
    return jax.tree.map(function, state, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
