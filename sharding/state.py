"""This file is one function that lays out a whole train state, and what goes with it.

A state is any pytree whose arrays stand in nnx variables that name their dimensions (`axes`): the
parameters of a model, and the moments that an optimizer keeps of them. What has no names (a step
count) is whole on every PE.

JAX holds no uneven array at a jit boundary, so that a state is kept padded: each dimension is
rounded up to a multiple of the PEs along it, with zeros, and its `logical_shape` is remembered.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from sharding.rules import Home, spec_of
from wsekern.wafer import context, layout
from wsekern.wafer.wafer import Wafer


def lay_out(state: Any, wafer: Wafer | None, home: Home = "wafer") -> Any:
    """The sharding of every array in `state`: a tree of its structure, for `out_shardings=`.

    Args:
      state: the state, or its shapes (`jax.eval_shape`).
      wafer: where it shall lie; None for one device.
      home: "wafer", or "memoryx" for where streamed weights live.
    """
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(leaf: Any) -> Any:
        found = one_device if wafer is None else wafer.sharding(layout_of(leaf, home))
        return leaf.replace(found) if isinstance(leaf, nnx.Variable) else found

    return _map(sharding, state)


def layout_of(leaf: Any, home: Home = "wafer") -> P:
    """The spec of one leaf of a state: an nnx variable with `axes`, or anything without names."""
    if not isinstance(leaf, nnx.Variable):
        return P()
    axes = leaf.get_metadata().get("axes")
    return P() if axes is None else spec_of(axes, home)


def initialize(make: Callable[[], Any], wafer: Wafer | None, home: Home = "wafer") -> Any:
    """`make()`, padded and laid out, with no whole copy of it on any device.

    Each device computes its own part, and the values are the same on every wafer.

    Args:
      make: builds a state from nothing; it is traced, never run as it stands.
      wafer: where it shall lie; None for one device.
      home: as for `lay_out`.
    """

    def build():
        return pad(make(), wafer, home)

    return jax.jit(build, out_shardings=lay_out(jax.eval_shape(build), wafer, home))()


def pad(state: Any, wafer: Wafer | None, home: Home = "wafer") -> Any:
    """`state` with every named array padded to what its wafer holds, its logical shape noted."""

    def grown(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return leaf
        value, shape = leaf.get_value(), logical_shape(leaf)
        whole = value if wafer is None else layout.pad(value, layout_of(leaf, home), wafer)
        return leaf.replace(whole, logical_shape=shape)

    return _map(grown, state)


def logical(state: Any) -> Any:
    """`state` without its padding, which is what a model computes with.

    On a wafer with Explicit axes, call it while that is the current one.
    """
    wafer = context.current()

    def cropped(leaf: Any) -> Any:
        shape = logical_shape(leaf)
        if shape == jnp.shape(leaf):
            return leaf
        value = leaf.get_value()
        if wafer is None:
            return leaf.replace(value[tuple(slice(0, n) for n in shape)])
        return leaf.replace(layout.crop(value, shape, layout_of(leaf), wafer))

    return _map(cropped, state)


def logical_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of one leaf of a state without its padding."""
    if isinstance(leaf, nnx.Variable) and "logical_shape" in leaf.get_metadata():
        return tuple(leaf.get_metadata()["logical_shape"])
    return tuple(jnp.shape(leaf))


def logical_shapes(state: Any) -> Any:
    """`state` with every array replaced by its shape without padding."""

    def shape(leaf: Any) -> Any:
        found = logical_shape(leaf)
        return leaf.replace(found) if isinstance(leaf, nnx.Variable) else found

    return _map(shape, state)


def named_leaves(state: Any) -> dict[str, Any]:
    """The leaves of `state`, nnx variables whole, by their path: `"params/blocks/norm/scale"`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _map(function: Callable[[Any], Any], state: Any) -> Any:
    return jax.tree.map(function, state, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
