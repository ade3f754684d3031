"""Contractions of whole arrays outside kernels, priced as the best program here would run them.

A trace does not say how XLA would split `a @ b`, and no product of arrays that are spread over many
PEs runs without moves. So such a contraction is assumed to run as the cheapest of these:

    tiled        both factors lie over the PEs: as `wk.matmul`, or `wk.gemv` for one vector
    replicated   the smaller factor is flooded to every PE, if it has room; rows of the other lie
                 over all PEs
    summed       two vectors, multiplied where they lie, and one all-reduce of a number

The elements of a batch share out the wafer: each gets a region of its own, as far as these go.

Sizes: B elements in a batch, M and N free elements of the factors, K that they have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.estimator import trace
from wsekern.kernels.matmul.gemv import gemv
from wsekern.kernels.matmul.matmul import matmul
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.limits import gather_limit
from wsekern.wafer.wafer import Wafer

PRIMITIVES = ("dot_general", "conv_general_dilated", "ragged_dot_general")
_EVERYWHERE = (ROWS, COLS)
_Shape = tuple[int, ...]


class Sizes(NamedTuple):
    """What a contraction costs by."""

    B: int
    M: int
    K: int
    N: int
    bytes: int  # of an element of the left factor
    # How the factors' dimensions meet: "nn", "nt", "tn" for two plain matrices; "" for any other.
    form: str = ""

    @property
    def flops(self) -> float:
        """Operations; a multiply-accumulate is two."""
        return 2.0 * self.B * self.M * self.K * self.N


class StandIn(NamedTuple):
    """The program that a contraction is assumed to run as."""

    name: str
    jaxpr: Any
    region: Wafer  # that an element of the batch has for itself; the whole wafer without a batch
    as_given: bool  # whether its operands are the contraction's own


def sizes_of(equation: JaxprEqn) -> Sizes:
    """The sizes of a `dot_general`, or those of the product that a convolution is."""
    params = equation.params
    avals: list[Any] = [v.aval for v in (*equation.invars[:2], equation.outvars[0])]
    a, b, out = avals
    if equation.primitive.name == "dot_general":
        (over_a, over_b), (batch, _) = params["dimension_numbers"]
        B, K = (math.prod(a.shape[d] for d in dims) for dims in (batch, over_a))
        M, N = (math.prod(x.shape) // max(1, B * K) for x in (a, b))
        plain = a.ndim == b.ndim == 2 and len(over_a) == 1 and a.dtype == b.dtype
        forms = {(1, 0): "nn", (1, 1): "nt", (0, 0): "tn"}
        form = forms.get((over_a[0], over_b[0]), "") if plain else ""
    elif equation.primitive.name == "ragged_dot_general":
        B, M, K, N = _ragged_sizes(equation)
        form = ""
    else:
        # Every output channel is a weighted sum of what lies under the filter: a product of
        # [places, channels x filter] and [channels x filter, output channels], for each group.
        channels = b.shape[params["dimension_numbers"].rhs_spec[0]]
        B = params["feature_group_count"] * params["batch_group_count"]
        K, N = math.prod(b.shape) // max(1, channels), channels // B
        M, form = math.prod(out.shape) // max(1, channels), ""
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        K, N, form = 2 * K, 2 * N, ""  # real and imaginary parts
    narrow = a.dtype.itemsize <= 2
    floating = jnp.issubdtype(a.dtype, jnp.floating)
    return Sizes(B, M, K, N, 2 if narrow else 4, form if floating else "")


def _ragged_sizes(equation: JaxprEqn) -> _Shape:
    """Sizes of groups of rows, each with a matrix of its own; all groups of the mean length.

    [M, K] by [G, K, N] to [M, N]   G products of M / G rows
    [K, M] by [K, N] to [G, M, N]   G products over K / G rows, as in the gradient of the matrices
    """
    avals: list[Any] = [v.aval for v in (*equation.invars, equation.outvars[0])]
    a, _, groups, out = (aval.shape for aval in avals)
    numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    K = math.prod(a[d] for d in numbers[0][0])
    G, M = groups[-1], math.prod(a) // max(1, K)
    if len(out) > 2:
        return G, M, -(-K // G), math.prod(out) // max(1, G * M)
    return G, -(-M // G), K, math.prod(out) // max(1, M)


def cheapest(sizes: Sizes, wafer: Wafer, price: Callable[[Any, Wafer], float]) -> StandIn:
    """The program with the fewest cycles.

    Args:
      sizes: of a contraction with no size of zero.
      wafer: of more than one PE.
      price: gives the cycles of a jaxpr on a wafer.
    """
    return min(_stand_ins(sizes, wafer), key=lambda s: price(s.jaxpr, s.region))


@functools.lru_cache(maxsize=256)
def _stand_ins(sizes: Sizes, wafer: Wafer) -> tuple[StandIn, ...]:
    region, share = _region(sizes.B, wafer)
    dtype = jnp.float16 if sizes.bytes == 2 else jnp.float32
    traced = []
    for name, run, a, b in _programs(sizes, region):
        operands = [jax.ShapeDtypeStruct(shape, dtype) for shape in (a, b)]
        as_given = bool(sizes.form) and name == "wk.matmul"
        if share > 1:  # one element of the batch after another
            run = functools.partial(_one_by_one, run)
            operands = [jax.ShapeDtypeStruct((share, *x.shape), dtype) for x in operands]
        jaxpr, _ = trace.trace_program("estimate", run, operands, region)
        traced.append(StandIn(name, jaxpr, region, as_given))
    return tuple(traced)


def _one_by_one(run: Callable, a: Float[Array, "share ..."], b: Float[Array, "share ..."]) -> Any:
    return lax.map(lambda pair: run(*pair), (a, b))


def _programs(sizes: Sizes, region: Wafer) -> Iterator[tuple[str, Callable, _Shape, _Shape]]:
    """The name, the function and the shapes of its factors of each program that can serve."""
    _, M, K, N, _, form = sizes
    pes = region.size
    if pes == 1:
        yield "on one PE", jnp.matmul, (M, K), (K, N)
        return
    if M == N == 1:
        length = _round_up(K, pes)
        yield "a sum", functools.partial(_summed, wafer=region), (length,), (length,)
        return
    if min(M, N) == 1:
        yield "wk.gemv", functools.partial(gemv, wafer=region), (1, K), (K, max(M, N))
    else:
        transposed = {"transpose_a": form == "tn", "transpose_b": form == "nt"}
        a = (K, M) if form == "tn" else (M, K)
        b = (N, K) if form == "nt" else (K, N)
        yield "wk.matmul", functools.partial(matmul, wafer=region, **transposed), a, b
    few, many = sorted((M, N))
    rounds = -(-few * K * sizes.bytes // gather_limit(region))
    if rounds <= few:
        shape = (_round_up(many, pes), K)
        run = functools.partial(_replicated, wafer=region)
        yield "a flood of its smaller factor", run, shape, (rounds, K, -(-few // rounds))


def _replicated(a: Float[Array, "M K"], b: Float[Array, "R K Nr"], wafer: Wafer) -> Any:
    """`a` by each of R parts of the other factor, which a PE holds one after another."""

    def kernel(a: Float[Array, "Mt K"], b: Float[Array, "R K Nr"]) -> Float[Array, "Mt R Nr"]:
        def step(a: Array, part: Array) -> tuple[Array, Array]:
            return a, (a @ fabric.broadcast(part, _EVERYWHERE)).astype(a.dtype)

        parts = lax.scan(step, a, b)[1] if len(b) > 1 else step(a, b[0])[1][None]
        return jnp.moveaxis(parts, 0, 1)

    rows = P(_EVERYWHERE, None)
    return wafer.map(kernel, in_specs=(rows, P()), out_specs=P(_EVERYWHERE, None, None))(a, b)


def _summed(a: Float[Array, " K"], b: Float[Array, " K"], wafer: Wafer) -> Any:
    run = wafer.map(
        lambda a, b: fabric.all_reduce((a * b).sum(keepdims=True), _EVERYWHERE),
        in_specs=P(_EVERYWHERE), out_specs=P(None), replicated_by_construction=True,
    )  # fmt: skip
    return run(a, b)


def _region(B: int, wafer: Wafer) -> tuple[Wafer, int]:
    """The part of the wafer that an element of a batch has, and how many elements share it.

    A batch of 12 on 8 x 8 PEs: regions of 2 x 2, of which there are 16, one for each element.
    """
    if B == 1:
        return wafer, 1
    rows = columns = 1
    each = -(-B // wafer.wafers)
    # The longer side of a region is halved until there are as many regions as elements.
    while rows * columns < each and (rows < wafer.height or columns < wafer.width):
        if wafer.height / rows >= wafer.width / columns:
            rows = min(2 * rows, wafer.height)
        else:
            columns = min(2 * columns, wafer.width)
    machine = wafer.machine
    assert machine is not None
    region = Wafer.abstract(machine, wafer.height // rows, wafer.width // columns)
    return dataclasses.replace(region, corner=wafer.corner), -(-each // (rows * columns))


def _round_up(n: int, parts: int) -> int:
    return -(-n // parts) * parts
