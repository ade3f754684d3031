"""Matrix product of whole arrays, which XLA splits between the devices as it does by itself.

XLA's partitioner gathers the operands, or sends one of them round while it multiplies (S. Wang et
al., "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models", ASPLOS 2023). What comes out is the program of a plain `a @ b` under `jax.jit` whose
operands and result have the layouts of `matmul`.
"""

import dataclasses
import math

from jaxtyping import Array, Float, Num

from wsekern.kernels.matmul import tile
from wsekern.kernels.matmul.problem import WORD_BYTES, MatmulPlan, MatmulProblem, PricedPlan
from wsekern.kernels.matmul.tile import TileResult


def price(problem: MatmulProblem) -> PricedPlan:
    """(w - 1) X + (h - 1) Y words in 2 steps, as `allgather`."""
    wafer = problem.wafer
    plan = MatmulPlan(
        name="xla",
        algorithm=ByXla(narrow=wafer.platform != "cpu", splits_rows=not _leaves_rows(problem)),
        whole=True,
        unit=math.lcm(wafer.height, wafer.width),  # X and Y must be padded alike
        splits_rows=not _leaves_rows(problem),
    )
    if wafer.backend != "devices":
        return PricedPlan(plan=plan, refused="is for devices; XLA does not split virtual PEs")
    return problem.price(
        plan,
        words=((wafer.width - 1) * problem.x + (wafer.height - 1) * problem.y) / WORD_BYTES,
        steps=2,
        hops=wafer.height + wafer.width,
        held_bytes=problem.gathered_bytes,
        seconds=_seconds(problem),
    )


def _leaves_rows(problem: MatmulProblem) -> bool:
    """Whether rows are not split along y: a caller cannot split those that do not divide."""
    divides = problem.rows % problem.wafer.height == 0
    return problem.on_accelerators and problem.form != "tn" and not divides


def _seconds(problem: MatmulProblem) -> float | None:
    rate, arithmetic = problem.link_bytes_per_second, problem.arithmetic_seconds
    if rate is None or arithmetic is None:
        return None
    wafer = problem.wafer
    if _leaves_rows(problem):
        # Y stays. All rows of one factor change places, and the sums of all rows are added.
        h, rows = wafer.height, problem.x_copies * problem.rows
        sent = rows * -(-problem.meeting // wafer.width) * problem.x_bytes
        summed = rows * -(-problem.columns // wafer.width) * problem.s_bytes
        return arithmetic + (sent + 2 * (h - 1) / h * summed) / rate
    shorter, longer = sorted(
        [(wafer.width - 1) * problem.x / rate, (wafer.height - 1) * problem.y / rate]
    )
    # Of the two gathers XLA sends the longer one round while it multiplies, if the product is long
    # enough (as compiled for v5e and v6e: from about half of the gather's time). Else it waits.
    if 2 * arithmetic >= longer:
        return shorter + max(longer, arithmetic)
    return shorter + longer + arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByXla:
    """Products of whole arrays."""

    # Sums of several devices travel in the operands' dtype, as XLA has them where nobody asks for
    # another. In `a @ b` operands travel and sums do not, so there they stay wide at no cost; but
    # not if rows are not split.
    narrow: bool
    splits_rows: bool = True

    def nn(
        self, x: Num[Array, "... M K"], y: Num[Array, "... K N"], result: TileResult
    ) -> Float[Array, "... M N"]:
        """S = X @ Y."""
        floating = x.dtype == y.dtype  # the scales of integers must meet wide sums
        narrow = floating and not self.splits_rows
        return tile.product("nn", x, y, self._narrow(x, result) if narrow else result)

    def nt(
        self, s: Num[Array, "... M N"], y: Num[Array, "... K N"], result: TileResult
    ) -> Float[Array, "... M K"]:
        """X = S @ Y^T."""
        return tile.product("nt", s, y, self._narrow(s, result))

    def tn(
        self, x: Num[Array, "... M K"], s: Num[Array, "... M N"], result: TileResult
    ) -> Float[Array, "... K N"]:
        """Y = X^T @ S."""
        return tile.product("tn", x, s, self._narrow(x, result))

    def _narrow(self, factor: Num[Array, "..."], result: TileResult) -> TileResult:
        return result._replace(sums=factor.dtype) if self.narrow else result
