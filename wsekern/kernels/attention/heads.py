"""Run a tile of attention a few heads at a time, so that a block of scores stays in cache.

Public per-PE functions, without communication. On a CPU, one head's block of 512 x 512 scores in
float32 fills the caches of two cores. Blocks of eight heads at once do not fit, and take half as
long again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar

from jax import lax
from jaxtyping import Array, Int, PyTree, Shaped

from wsekern.kernels.attention.mask import Keys, Rows, Rule

Carry = TypeVar("Carry")
Record: TypeAlias = PyTree[Shaped[Array, "..."]]  # a NamedTuple of arrays, such as `Rows`
Place = tuple[Int[Array, ""], Int[Array, ""]]  # the first sequence and key-value head of a part

# The axes that count sequences and key-value heads, by the name of the field; None: it has none.
_AXES = {"kv": (2, 3), "dkv": (2, 3), "segments": (1, None), "start": (None, None)}
_OTHER_AXES = (1, 2)


def few_heads_at_once(
    body: Callable[[Carry, Rows, Keys], Carry], carry: Carry, rows: Rows, keys: Keys, rule: Rule
) -> Carry:
    """`body(carry, rows, keys)`, in a loop over as many heads as `rule.scores_at_once` allows.

    Args:
      body: returns the updated carry; it must work for any number of sequences and heads.
      carry: a NamedTuple of arrays whose axes lie as those of `Rows`, `Keys` or their gradients.
      rows: queries.
      keys: keys and values.
      rule: `scores_at_once` limits the scores that one block has; None runs all heads at once.
    """
    _, B, K, G, c, _ = rows.q.shape
    S = keys.kv.shape[-2]
    one_head = G * c * min(S, rule.band or S)
    limit = rule.scores_at_once
    if limit is None or B * K * one_head <= limit:
        return body(carry, rows, keys)
    heads = max(h for h in range(1, K + 1) if K % h == 0 and (h == 1 or h * one_head <= limit))

    def step(index: Int[Array, ""], carry: Carry) -> Carry:
        begin = index // (K // heads), index % (K // heads) * heads
        part = body(*(_cut(x, begin, heads) for x in (carry, rows, keys)))
        return _put(carry, part, begin)

    return lax.fori_loop(0, B * K // heads, step, carry)


def _cut(record: Record, begin: Place, heads: int) -> Record:
    def cut(name: str, leaf: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        axes = _AXES.get(name, _OTHER_AXES)
        for axis, start, size in zip(axes, begin, (1, heads), strict=True):
            if axis is not None and leaf.shape[axis] > 1:  # what all heads share stays whole
                leaf = lax.dynamic_slice_in_dim(leaf, start, size, axis)
        return leaf

    return _map_fields(cut, record)


def _put(record: Carry, part: Carry, begin: Place) -> Carry:
    def put(
        name: str, leaf: Shaped[Array, "..."], new: Shaped[Array, "..."]
    ) -> Shaped[Array, "..."]:
        starts: list[Int[Array, ""] | int] = [0] * leaf.ndim
        for axis, start in zip(_AXES.get(name, _OTHER_AXES), begin, strict=True):
            if axis is not None and leaf.shape[axis] > 1:
                starts[axis] = start
        return lax.dynamic_update_slice(leaf, new, starts)

    return _map_fields(put, record, part)


def _map_fields(
    function: Callable[..., Shaped[Array, "..."]], record: Record, *others: Record
) -> Record:
    """`record` with `function(name, field, *fields of others)` in place of each field not None."""
    fields = {
        name: function(name, leaf, *(getattr(other, name) for other in others))
        for name, leaf in record._asdict().items()
        if leaf is not None
    }
    return record._replace(**fields)
