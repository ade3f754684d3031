"""Stack equal layers into one, with a leading layer dimension, and scan over it.

Compile time and program size are then those of one layer, whatever the depth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sharding.gather import gather
from sharding.rules import Home
from wsekern.wafer import context


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` layers as one module, whose parameters have a leading dimension named "layer".

    Args:
      make_layer: makes one layer from random streams of its own.
      layers: how many layers to make.
      rngs: the streams that seed each layer's.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    state = jax.vmap(lambda key: nnx.state(make_layer(nnx.Rngs(key))))(keys)

    def with_layer_axis(variable: nnx.Variable) -> nnx.Variable:
        # By hand: nnx.vmap would leave two names on the three dimensions of the stacked array.
        return variable.replace(variable[...], axes=("layer", *variable.axes))

    state = jax.tree.map(with_layer_axis, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graph, state)


def scan(
    stacked: nnx.Module,
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    *,
    remat: bool,
    home: Home = "wafer",
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Any, Any]:
    """Run `carry, out = step(layer, carry)` for each layer of `stacked` in turn.

    Args:
      stacked: a module that `stack` made.
      step: a function of one layer and the carry; returns the new carry and the layer's output.
      carry: the input of the first layer.
      remat: whether the backward pass recomputes a layer from its input instead of storing its
        intermediate values; this costs one more forward pass.
      home: where the parameters lie. At "memoryx" they are split over the wafers, and gathered
        one layer at a time.
      dtype: that weights compute in, and are gathered in.

    Returns:
      The carry after the last layer, and the outputs of all layers, stacked.
    """
    graph, state = nnx.split(stacked)

    wafer = context.resolve(None) if home == "memoryx" else None

    def layer(carry: Any, state: nnx.State) -> tuple[Any, Any]:
        if wafer is not None:
            # Without it XLA may gather the whole stack before the loop.
            state = gather(_without_layer_axis(state), wafer, dtype)
        return step(nnx.merge(graph, state), carry)

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    # A scan of one trip would still cost a loop.
    if jax.tree.leaves(state)[0].shape[0] == 1:
        carry, out = layer(carry, jax.tree.map(lambda a: a[0], state))
        return carry, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(layer, carry, state)


def _without_layer_axis(layer: nnx.State) -> nnx.State:
    """One layer's slices, with the names of the dimensions that they have."""
    return jax.tree.map(
        lambda v: v.replace(v.get_value(), axes=v.axes[1:]),
        layer,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )


def unstack(stacked: nnx.Module) -> list[nnx.Module]:
    """The layers of `stacked` as modules, each with arrays of its own (slices)."""
    graph, state = nnx.split(stacked)
    count = jax.tree.leaves(state)[0].shape[0]

    def slice_of(i: int) -> nnx.State:
        def layer_of(variable: nnx.Variable) -> nnx.Variable:
            return variable.replace(variable[...][i], axes=variable.axes[1:])

        return jax.tree.map(layer_of, state, is_leaf=lambda v: isinstance(v, nnx.Variable))

    return [nnx.merge(graph, slice_of(i)) for i in range(count)]
