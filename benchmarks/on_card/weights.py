"""Random weights made on the card, array by array: one small program for each shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def random_weights(shapes: Any, std: float, dtype: str) -> Any:
    """A tree of arrays like `shapes`: ones for the scales of norms, else normal numbers.

    Args:
      shapes: the state of a model, of arrays or `jax.ShapeDtypeStruct`s.
      std: of the normal numbers.
      dtype: of all arrays.
    """
    pairs, tree = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = []
    for number, (path, leaf) in enumerate(pairs):
        is_scale = "scale" in jax.tree_util.keystr(path)
        key = jax.random.key(number)
        leaves.append(
            jnp.ones(leaf.shape, dtype) if is_scale else _normal(key, leaf.shape, std, dtype)
        )
    return jax.tree.unflatten(tree, leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], std: float, dtype: str) -> jax.Array:
    return std * jax.random.normal(key, shape, dtype)
