"""This file is many equal layers held as one, with a leading layer dimension, and scanned.

Compile time and program size are then those of one layer, whatever the depth.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def stack(make_layer: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """`layers` layers as one module, whose parameters have a leading dimension named "layer".

    Args:
      make_layer: makes one layer from its own random streams.
      layers: how many.
      rngs: the streams that each layer's are drawn from.
    """
    graph = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), layers)
    state = jax.vmap(lambda key: nnx.state(make_layer(nnx.Rngs(key))))(keys)

    def named(variable: nnx.Variable) -> nnx.Variable:
        # nnx.vmap would leave the names of one layer on the stacked array.
        return variable.replace(variable[...], axes=("layer", *variable.axes))

    state = jax.tree.map(named, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.merge(graph, state)


def scan(
    stacked: nnx.Module, step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, *, remat: bool
) -> tuple[Any, Any]:
    """`carry` taken through the layers of `stacked` in turn: `carry, out = step(layer, carry)`.

    Args:
      stacked: what `stack` made.
      step: of one layer and what is carried: what is carried on, and what the layer gives.
      carry: what goes into the first layer.
      remat: whether the backward pass recomputes a layer from its input instead of keeping what
        it computed, which costs one more forward pass.

    Returns:
      What comes out of the last layer, and what the layers gave, stacked.
    """
    graph, state = nnx.split(stacked)

    def layer(carry, state):
        return step(nnx.merge(graph, state), carry)

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    if jax.tree.leaves(state)[0].shape[0] == 1:
        carry, out = layer(carry, jax.tree.map(lambda a: a[0], state))
        return carry, jax.tree.map(lambda a: a[None], out)
    return jax.lax.scan(layer, carry, state)


def unstack(stacked: nnx.Module) -> list[nnx.Module]:
    """The layers of `stacked`, each with arrays of its own."""
    graph, state = nnx.split(stacked)
    count = jax.tree.leaves(state)[0].shape[0]

    def layer(i):
        def one(variable):
            return variable.replace(variable[...][i], axes=variable.axes[1:])

        return jax.tree.map(one, state, is_leaf=lambda v: isinstance(v, nnx.Variable))

    return [nnx.merge(graph, layer(i)) for i in range(count)]
