"""Matrix product shared by several wafers, each with a copy of both operands: 2.5D.

E. Solomonik and J. Demmel, "Communication-Optimal Parallel 2.5D Matrix Multiplication and LU
Factorization Algorithms", 2011: each of c wafers does a c-th of the steps, here those of MeshGEMM,
and the results are summed over the wafers.
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Float, Num, Shaped

from wsekern import fabric
from wsekern.kernels.matmul import cannon, shares
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileAlgorithm, TileResult
from wsekern.wafer.axes import WAFERS


def price(problem: MatmulProblem) -> PricedPlan:
    """A c-th of the steps of `mesh_gemm`, then 2 (c - 1) / c S words in one more step."""
    wafers = problem.wafer.wafers
    share = dataclasses.replace(problem, meeting=-(-problem.meeting // wafers))
    inner = cannon.price_mesh_gemm(share)
    algorithm = Replicated(on_each_wafer=inner.plan.algorithm)
    plan = MatmulPlan(name="2.5d", algorithm=algorithm, unit=inner.plan.unit * wafers)
    if wafers == 1:
        return PricedPlan(plan=plan, refused="needs more than one wafer, there is one")
    if problem.batched:
        refused = "is for matrices that all wafers hold; a has leading dimensions"
        return PricedPlan(plan=plan, refused=refused)
    if inner.refused:
        return PricedPlan(plan=plan, refused=inner.refused)
    # S is summed over the wafers; X or Y is gathered from them.
    joined = {"nn": 2 * problem.s, "nt": problem.x, "tn": problem.y}[problem.form]
    return problem.price(
        plan,
        words=inner.words + joined * (wafers - 1) / wafers / WORD_BYTES,
        steps=inner.steps + 1,
        hops=inner.hops,
        held_bytes=inner.held_bytes,
        wafers=wafers,
        note=f"{inner.plan.name} on each wafer",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicated:
    """Each wafer multiplies its share of the meeting dimension by MeshGEMM."""

    on_each_wafer: TileAlgorithm

    def nn(
        self, x: Num[Array, "... Mt Kx"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Nt"]:
        """S = X @ Y: one all-reduce over the wafers at the end."""
        wafers = fabric.axis_size(WAFERS)
        x = _of_this_wafer(shares.split_columns(x, wafers))
        y = _of_this_wafer(shares.split_rows(y, wafers))
        return fabric.all_reduce(self.on_each_wafer.nn(x, y, result), WAFERS)

    def nt(
        self, s: Num[Array, "... Mt Nt"], y: Num[Array, "... Ky Nt"], result: TileResult
    ) -> Float[Array, "... Mt Kx"]:
        """X = S @ Y^T: one gather over the wafers at the end."""
        wafers = fabric.axis_size(WAFERS)
        *leading, width = result.shape
        share = result.with_shape(*leading, width // wafers)
        y = _of_this_wafer(shares.split_rows(y, wafers))
        return shares.join_columns(_of_all_wafers(self.on_each_wafer.nt(s, y, share)))

    def tn(
        self, x: Num[Array, "... Mt Kx"], s: Num[Array, "... Mt Nt"], result: TileResult
    ) -> Float[Array, "... Ky Nt"]:
        """Y = X^T @ S: one gather over the wafers at the end."""
        wafers = fabric.axis_size(WAFERS)
        *leading, height, width = result.shape
        share = result.with_shape(*leading, height // wafers, width)
        x = _of_this_wafer(shares.split_columns(x, wafers))
        return shares.join_rows(_of_all_wafers(self.on_each_wafer.tn(x, s, share)))


def _of_this_wafer(shares: Shaped[Array, "wafers ..."]) -> Shaped[Array, "..."]:
    return lax.dynamic_index_in_dim(shares, fabric.axis_index(WAFERS), 0, keepdims=False)


def _of_all_wafers(share: Shaped[Array, "..."]) -> Shaped[Array, "wafers ..."]:
    return fabric.all_gather(share[None], WAFERS, 0, replicated=True)
