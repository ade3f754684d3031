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


def scan(stacked: nnx.Module, x: Any, *context: Any, remat: bool = False) -> Any:
    """`x` carried through the layers of `stacked` in turn: `x = layer(x, *context)`.

    Args:
      stacked: what `stack` made.
      x: the activations.
      context: further arguments, the same for every layer.
      remat: whether the backward pass recomputes a layer from its input instead of keeping what
        it computed, which costs one more forward pass.
    """
    graph, state = nnx.split(stacked)

    def layer(x, state):
        return nnx.merge(graph, state)(x, *context), None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    x, _ = jax.lax.scan(layer, x, state)
    return x
