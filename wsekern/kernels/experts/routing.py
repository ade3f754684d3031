"""This file is how rows come to the wafers that hold their experts, how results come back, and the
loss that keeps the ways even.

D. Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
Sharding", 2020, for buckets of one size between devices; here rows that do not fit are not dropped:
all wafers then take the way of a gather, which holds everything. The loss is equations 4 to 6 of
W. Fedus, B. Zoph and N. Shazeer, "Switch Transformers", 2021.

With W wafers and n rows a PE of k choices each, a gather brings (W-1) n rows and its results as
many. In buckets a row goes once to each wafer that has any of its experts, (1 - (1 - 1/W)^k) of the
n on average; a bucket has room for a half more.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from wsekern import fabric
from wsekern.wafer.axes import ROWS, WAFERS

_ROOM = 1.5  # of a bucket, over what comes on average


def load_balance_loss(
    probabilities: Float[Array, "*batch E"], chosen: Int[Array, "*batch k"]
) -> Float[Array, ""]:
    """E times the sum over experts of their share of the choices and their mean probability.

    It is k where experts are used evenly, and more where they are not.

    Args:
      probabilities: the router's, of all experts.
      chosen: the experts of each token.
    """
    E = probabilities.shape[-1]
    used = jnp.zeros(E, jnp.float32).at[chosen.reshape(-1)].add(1.0)
    used = used / (chosen.size // chosen.shape[-1])
    mean = probabilities.astype(jnp.float32).reshape(-1, E).mean(0)
    return E * (lax.stop_gradient(used) * mean).sum()


class Route(NamedTuple):
    """A way to the wafers and back."""

    send: Callable[[Any], Any]  # rows [n, ...] of this wafer to those that this wafer works on
    back: Callable[[Float[Array, "m D"]], Float[Array, "n D"]]  # and the sum of what was made there


def routed(chosen: Int[Array, "n k"], experts: int, work: Callable[[Route], Any]) -> Any:
    """`work(route)`, by buckets if all rows fit into them, else by a gather.

    Args:
      chosen: the experts of each row of this wafer, counted over all wafers.
      experts: how many each wafer holds.
      work: what is done with a route; the shapes of what it gives do not depend on the route. Rows
        that fill up a bucket are zeros, and of integers -1.
    """
    wafers, (n, k) = fabric.axis_size(WAFERS), chosen.shape
    room = bucket(n, k, wafers)
    if room >= n:
        return work(_GATHER)
    goes = (chosen[:, None] // experts == jnp.arange(wafers)[None, :, None]).any(2)
    # The same on every PE: columns hold the same choices, and rows agree.
    fullest = fabric.all_reduce(goes.sum(0).max(), (WAFERS, ROWS), "max")
    by_buckets = functools.partial(work, _buckets(goes, room))
    return lax.cond(fullest <= room, by_buckets, functools.partial(work, _GATHER))


def bucket(rows: int, choices: int, wafers: int) -> int:
    """How many rows a wafer can send to another; `rows` or more where a gather is no dearer."""
    average = rows * (1 - (1 - 1 / wafers) ** choices)
    return int(_ROOM * average) + 1


_GATHER = Route(
    send=lambda rows: fabric.all_gather(rows, WAFERS, 0),
    back=lambda made: fabric.reduce_scatter(made, WAFERS, 0),
)


def _buckets(goes: Bool[Array, "n W"], room: int) -> Route:
    n, wafers = goes.shape
    place = jnp.where(goes, jnp.cumsum(goes, 0) - 1, room)
    row, wafer = jnp.meshgrid(jnp.arange(n), jnp.arange(wafers), indexing="ij")
    # The row in each place of each bucket; n where there is none.
    held = jnp.full((wafers, room), n).at[wafer, place].set(row, mode="drop").reshape(-1)

    def send(rows):
        def one(array):
            empty = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
            filled = array.at[held].get(mode="fill", fill_value=empty)
            return fabric.all_to_all(filled, WAFERS, 0, 0)

        return jax.tree.map(one, rows)

    def back(made):
        returned = fabric.all_to_all(made, WAFERS, 0, 0)
        zeros = fabric.varying(jnp.zeros((n, *made.shape[1:]), made.dtype))
        return zeros.at[held].add(returned, mode="drop")

    return Route(send, back)
