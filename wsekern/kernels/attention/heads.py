"""This file is a tile of attention taken a few heads at a time, so that a block stays in cache.

Public per-PE functions, without communication. On a CPU one head's block of 512 x 512 scores in
float32 is as large as the caches of two cores; the blocks of eight heads at once are not, and take
half as long again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from wsekern.kernels.attention.mask import Keys, Rows, Rule

# In which of its dimensions each field has batch and key-value heads.
_AXES = {"kv": (2, 3), "dkv": (2, 3), "segments": (1, None), "start": (None, None)}
_OTHERS = (1, 2)


def few_at_once(body: Callable, carry: Any, rows: Rows, keys: Keys, rule: Rule) -> Any:
    """`body(carry, rows, keys)`, for as many heads at a time as `rule.at_once` scores allow.

    Args:
      body: returns what it is handed first, changed, whatever number of heads it is handed.
      carry: a NamedTuple of arrays that have the heads as `Rows`, `Keys` or their gradients do.
      rows: queries.
      keys: keys and values.
      rule: tells how many scores of a block there may be at once; None is any number.
    """
    _, B, K, G, c, _ = rows.q.shape
    S = keys.kv.shape[-2]
    one = G * c * min(S, rule.band or S)
    if rule.at_once is None or B * K * one <= rule.at_once:
        return body(carry, rows, keys)
    heads = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * one <= rule.at_once))

    def step(index, carry):
        at = index // (K // heads), index % (K // heads) * heads
        part = body(*(_cut(x, at, heads) for x in (carry, rows, keys)))
        return _put(carry, part, at)

    return lax.fori_loop(0, B * K // heads, step, carry)


def _cut(x: Any, at: tuple[jax.Array, jax.Array], heads: int) -> Any:
    def cut(name, leaf):
        for axis, start, size in zip(_AXES.get(name, _OTHERS), at, (1, heads), strict=True):
            if axis is not None and leaf.shape[axis] > 1:  # what is the same for all stays whole
                leaf = lax.dynamic_slice_in_dim(leaf, start, size, axis)
        return leaf

    return _each(cut, x)


def _put(x: Any, part: Any, at: tuple[jax.Array, jax.Array]) -> Any:
    def put(name, leaf, new):
        starts: list[Any] = [0] * leaf.ndim
        for axis, start in zip(_AXES.get(name, _OTHERS), at, strict=True):
            if axis is not None and leaf.shape[axis] > 1:
                starts[axis] = start
        return lax.dynamic_update_slice(leaf, new, starts)

    return _each(put, x, part)


def _each(function: Callable, x: Any, *others: Any) -> Any:
    fields = {
        name: function(name, leaf, *(getattr(other, name) for other in others))
        for name, leaf in x._asdict().items()
        if leaf is not None
    }
    return x._replace(**fields)
