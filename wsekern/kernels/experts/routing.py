"""Send tokens to the wafers that hold their experts and bring results back; the balance loss.

D. Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
Sharding", 2020, for buckets of one size between devices. Here no row is dropped: if some do not fit
into their bucket, all wafers gather all rows instead. The loss is equations 4 to 6 of W. Fedus,
B. Zoph and N. Shazeer, "Switch Transformers", 2021.

With W wafers and n rows a PE of k choices each, a gather brings (W-1) n rows, and its results as
many. By buckets, a row goes once to each wafer that holds any of its experts: with an even choice,
(1 - (1 - 1/W)^k) n rows to each wafer. A bucket has room for a half more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from wsekern import fabric
from wsekern.wafer.axes import ROWS, WAFERS

_BUCKET_ROOM = 1.5  # over the average

Result = TypeVar("Result")


def load_balance_loss(
    probabilities: Float[Array, "*batch E"], chosen: Int[Array, "*batch k"]
) -> Float[Array, ""]:
    """A loss that keeps a router's use of its E experts even (Switch Transformers, 2021).

    E times the sum over experts of two factors: the expert's share of the tokens, and its mean
    probability. It is k where experts are used evenly, and more where they are not. Computed in
    float32; the gradient flows through the probabilities only.

    For T tokens it counts T k choices of E experts and takes a mean of T E probabilities. If tokens
    are split over devices, XLA sums E words over them twice, once for each.

    Args:
      probabilities: the router's, of all experts.
      chosen: the k experts of each token.
    """
    E = probabilities.shape[-1]
    # Counted by a sum: XLA's partitioner lets a scatter of a dimension that does not divide by the
    # devices count the padding too.
    chosen_by = jax.nn.one_hot(chosen, E, dtype=jnp.float32)
    used = chosen_by.sum(range(chosen.ndim)) / (chosen.size // chosen.shape[-1])
    mean = probabilities.astype(jnp.float32).mean(range(probabilities.ndim - 1))
    return E * (lax.stop_gradient(used) * mean).sum()


class Route(NamedTuple):
    """A way to other wafers and back."""

    # Rows [n, ...] of this wafer, any pytree, to the m rows that this wafer works on.
    send: Callable[[Any], Any]
    # Their results back to this wafer's rows, which are summed over the wafers they were sent to.
    send_back: Callable[[Float[Array, "m D"]], Float[Array, "n D"]]


def run_routed(chosen: Int[Array, "n k"], experts: int, work: Callable[[Route], Result]) -> Result:
    """`work(route)`, with a route by buckets if all rows fit into them, else by a gather.

    Args:
      chosen: the experts of each row of this wafer, numbered over all wafers.
      experts: how many each wafer holds.
      work: computes with a route; the shapes of its result must not depend on the route. An empty
        place of a bucket arrives as a row of zeros, or of -1 where rows are integers.
    """
    wafers, (n, k) = fabric.axis_size(WAFERS), chosen.shape
    room = bucket_rows(n, k, wafers)
    if room >= n:
        return work(_GATHER)
    goes = (chosen[:, None] // experts == jnp.arange(wafers)[None, :, None]).any(2)
    # All PEs must take the same branch. They do: columns have the same choices, and the maximum is
    # taken over rows and wafers.
    fullest = fabric.all_reduce(goes.sum(0).max(), (WAFERS, ROWS), "max")
    by_buckets = functools.partial(work, _bucket_route(goes, room))
    return lax.cond(fullest <= room, by_buckets, functools.partial(work, _GATHER))


def bucket_rows(rows: int, choices: int, wafers: int) -> int:
    """The room of a bucket, from a wafer to another; at `rows` or more a gather costs no more."""
    average = rows * (1 - (1 - 1 / wafers) ** choices)
    return int(_BUCKET_ROOM * average) + 1


_GATHER = Route(
    send=lambda rows: fabric.all_gather(rows, WAFERS, 0),
    send_back=lambda results: fabric.reduce_scatter(results, WAFERS, 0),
)


def _bucket_route(goes: Bool[Array, "n W"], room: int) -> Route:
    """The route by buckets of `room` rows; `goes` says which row goes to which wafer.

    Two wafers, room for 2 rows, rows 0 and 2 go to wafer 0 and rows 1 and 2 to wafer 1:

        place   [[0, -], [-, 0], [1, 1]]    a row's place in each wafer's bucket
        source  [0, 2 | 1, 2]               the row in each place of each bucket
    """
    n, wafers = goes.shape
    place = jnp.where(goes, jnp.cumsum(goes, 0) - 1, room)  # `room`: in no bucket, dropped below
    row, wafer = jnp.meshgrid(jnp.arange(n), jnp.arange(wafers), indexing="ij")
    empty = jnp.full((wafers, room), n)  # row n does not exist
    source = empty.at[wafer, place].set(row, mode="drop").reshape(-1)

    def send(rows: PyTree[Shaped[Array, "n ..."]]) -> PyTree[Shaped[Array, "m ..."]]:
        def send_one(array: Shaped[Array, "n ..."]) -> Shaped[Array, "m ..."]:
            fill = -1 if jnp.issubdtype(array.dtype, jnp.integer) else 0
            buckets = array.at[source].get(mode="fill", fill_value=fill)
            return fabric.all_to_all(buckets, WAFERS, 0, 0)

        return jax.tree.map(send_one, rows)

    def send_back(results: Float[Array, "m _"]) -> Float[Array, "n _"]:
        returned = fabric.all_to_all(results, WAFERS, 0, 0)
        zeros = fabric.varying(jnp.zeros((n, *results.shape[1:]), results.dtype))
        return zeros.at[source].add(returned, mode="drop")

    return Route(send, send_back)
