"""Contractions of whole arrays outside kernels, priced as the best program here would run them.

A trace does not say how XLA would split `a @ b`, and no product of arrays that are spread over many
PEs runs without moves. So such a contraction is assumed to run as the cheapest of these:

    tiled        both factors lie over the PEs: as `wk.matmul`, or `wk.gemv` for one vector
    replicated   the smaller factor is flooded to every PE, if it has room; rows of the other lie
                 over all PEs
    sliced       every PE multiplies a slice of what the factors have in common, and one all-reduce
                 adds up these products
    summed       two vectors, multiplied where they lie, and one all-reduce of a number

The elements of a batch share out the wafer: each gets a region of its own, as far as these go. Or
they have the whole wafer one after another.

Sizes: B elements in a batch, M and N free elements of the factors, K that they have in common.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.estimator import trace
from wsekern.estimator.product_sizes import product_sizes
from wsekern.kernels.matmul.gemv import gemv
from wsekern.kernels.matmul.matmul import matmul
from wsekern.wafer.axes import COLS, ROWS
from wsekern.wafer.limits import gather_limit
from wsekern.wafer.wafer import Wafer

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
    """The sizes of a product, or those of the product that a convolution is."""
    avals: list[Any] = [v.aval for v in equation.invars[:2]]
    a, b = avals
    form = ""
    if equation.primitive.name == "dot_general" and a.ndim == b.ndim == 2 and a.dtype == b.dtype:
        (over_a, over_b), _ = equation.params["dimension_numbers"]
        forms = {((1,), (0,)): "nn", ((1,), (1,)): "nt", ((0,), (0,)): "tn"}
        form = forms.get((tuple(over_a), tuple(over_b)), "")
    narrow, floating = a.dtype.itemsize <= 2, jnp.issubdtype(a.dtype, jnp.floating)
    return Sizes(*product_sizes(equation), 2 if narrow else 4, form if floating else "")


def asked_flops(kernel: JaxprEqn, true_shapes: Sequence[_Shape | None]) -> float | None:
    """The operations that a product was asked for, without those on padding; None: not known.

    Args:
      kernel: that multiplies its first operand by the others, or is the gradient of that: then its
        operands are a left factor, right factors, and the gradient of each product.
      true_shapes: of its operands before they were padded; None: as they are.
    """
    pairs = zip(kernel.invars, true_shapes, strict=True)
    matrices = [_Padded.of(atom, true) for atom, true in pairs]
    if not matrices:  # what a gradient computes ahead may have no operands
        return None
    # A bias and scales are vectors.
    left, *others = [m for i, m in enumerate(matrices) if i == 0 or m.ndim > 1]
    outs = [out for v in kernel.outvars if (out := _Padded.of(v, None)).ndim > 0]
    count = len(others)
    half = others[: count // 2]
    backward = [out.padded for out in outs] == [m.padded for m in (left, *half)]
    if backward and count % 2 == 0:
        products, times = list(zip(half, others[count // 2 :], strict=True)), 2
    else:
        products, times = list(zip(others, outs, strict=False)), 1
    columns = [_columns(left, right, out) for right, out in products]
    if not columns or None in columns:
        return None
    return 2.0 * times * math.prod(left.true) * sum(n or 0 for n in columns)


class _Padded(NamedTuple):
    """The shape of a matrix, and its shape without padding; of a vector, as of one row."""

    padded: _Shape
    true: _Shape
    ndim: int

    @classmethod
    def of(cls, atom: Any, true: _Shape | None) -> _Padded:
        shape = tuple(getattr(atom.aval, "shape", ()))
        row = (1,) if len(shape) == 1 else ()
        return cls(row + shape, row + (true or shape), len(shape))


def _columns(left: _Padded, right: _Padded, out: _Padded) -> int | None:
    """The columns of `left @ right`, of `left @ right.T` or of `left.T @ right`, if it is `out`."""
    for row, over, right_over in ((-2, -1, -2), (-2, -1, -1), (-1, -2, -2)):
        column = -3 - right_over
        shape = left.padded[row], right.padded[column]
        if left.true[over] == right.true[right_over] and shape == out.padded[-2:]:
            return right.true[column]
    return None


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
    dtype = jnp.float16 if sizes.bytes == 2 else jnp.float32
    regions = [_region(sizes.B, wafer)]
    if 1 < sizes.B < wafer.size:
        regions.append((wafer, sizes.B))
    traced = []
    for region, share in regions:
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
        if min(M, N) < max(region.height, region.width) and M > N:
            # Rows are filled up to tiles otherwise than columns: the transposed product may be
            # cheaper, and takes as much as that of the transposed factors.
            yield "wk.matmul, transposed", functools.partial(matmul, wafer=region), (N, K), (K, M)
    # The most sums that a PE can hold are made in one round.
    rounds = -(-M * N * 4 // gather_limit(region))
    if max(M, N) < K and rounds <= N:
        length, run = _round_up(K, pes), functools.partial(_sliced, wafer=region)
        yield "a sum over slices of K", run, (M, length), (rounds, length, -(-N // rounds))
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


def _sliced(a: Float[Array, "M K"], b: Float[Array, "R K Nr"], wafer: Wafer) -> Any:
    """`a` by each of R parts of the other factor; every PE keeps its part of the sums."""

    def kernel(a: Float[Array, "M Kt"], b: Float[Array, "R Kt Nr"]) -> Float[Array, "R St"]:
        kept = -(-a.shape[0] * b.shape[2] // wafer.size)
        place = fabric.axis_index(ROWS) * wafer.width + fabric.axis_index(COLS)

        def step(a: Array, part: Array) -> tuple[Array, Array]:
            sums = jnp.matmul(a, part, preferred_element_type=jnp.float32)
            sums = fabric.all_reduce(sums, _EVERYWHERE).astype(a.dtype).reshape(-1)
            sums = jnp.pad(sums, (0, kept * wafer.size - sums.size))
            return a, lax.dynamic_slice_in_dim(sums, place * kept, kept)

        return lax.scan(step, a, b)[1] if len(b) > 1 else step(a, b[0])[1][None]

    slices = P(None, _EVERYWHERE), P(None, _EVERYWHERE, None)
    return wafer.map(kernel, in_specs=slices, out_specs=P(None, _EVERYWHERE))(a, b)


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
