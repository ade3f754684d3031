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
        algorithm=ByXla(narrow=wafer.platform != "cpu"),
        whole=True,
        unit=math.lcm(wafer.height, wafer.width),  # X and Y must be padded alike
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


def _seconds(problem: MatmulProblem) -> float | None:
    rate, arithmetic = problem.link_bytes_per_second, problem.arithmetic_seconds
    if rate is None or arithmetic is None:
        return None
    wafer = problem.wafer
    shorter, longer = sorted(
        [(wafer.width - 1) * problem.x / rate, (wafer.height - 1) * problem.y / rate]
    )
    # Large operands: it hides one of the two gathers behind the product, as far as that goes.
    return arithmetic + longer + max(0.0, shorter - arithmetic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByXla:
    """Products of whole arrays."""

    # Sums of several devices travel in the operands' dtype, as XLA has them where nobody asks for
    # another. In `a @ b` operands travel and sums do not, so there they stay wide at no cost.
    narrow: bool

    def nn(
        self, x: Num[Array, "... M K"], y: Num[Array, "... K N"], result: TileResult
    ) -> Float[Array, "... M N"]:
        """S = X @ Y."""
        return tile.product("nn", x, y, result)

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
