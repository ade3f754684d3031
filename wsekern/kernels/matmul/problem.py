"""A matrix product on a wafer in numbers: its sizes, the plan of an algorithm, and its price.

Words are 32-bit and are those that a PE receives; steps are moves that wait for one another; held
bytes are what a PE keeps of others' tiles at a time. All are of the product alone. Cycles are
predicted for wafers only, by the model of P. Luczynski et al., "Near-Optimal Wafer-Scale Reduce",
HPDC 2024: the longer of words through a PE and arithmetic, then hops, and 2 ramps + 1 for every
dependent step. Seconds are predicted for accelerators that `wsekern.hardware` knows, from their
peak and from bytes over the rate of one link; each algorithm knows what of that it hides.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jax.sharding import PartitionSpec as P

from wsekern.hardware import Accelerator, accelerator
from wsekern.kernels.matmul.tile import ROLES, Form, Matrix, TileAlgorithm
from wsekern.wafer import layout
from wsekern.wafer.axes import COLS
from wsekern.wafer.explanation import Candidate
from wsekern.wafer.limits import gather_limit, on_accelerators
from wsekern.wafer.wafer import Wafer

WORD_BYTES = 4
_GATHERED_BYTES = 4 * 2**20  # on an emulated device (benchmarks/RESULTS.md)


@runtime_checkable
class Described(Protocol):
    """An array, or anything with the shape and dtype of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPlan:
    """An algorithm with its options, and what it asks of the sizes."""

    name: str
    algorithm: TileAlgorithm
    unit: int = 1  # the meeting dimension is padded to a multiple of it
    whole: bool = False  # it multiplies whole arrays and not tiles: XLA splits them
    # Whether several right factors are put side by side. That is a pass over them; without, XLA
    # must see by itself that the left one moves only once.
    joins: bool = True
    splits_rows: bool = True  # of `a` and the result; else every PE along y has them all

    def multiples(self, matrix: Matrix) -> tuple[int, int]:
        """What the rows and the columns of a matrix are padded to a multiple of."""
        return {"X": (1, self.unit), "Y": (self.unit, 1), "S": (1, 1)}[matrix]

    def spec(self, ndim: int) -> P:
        """How `a` and the result lie."""
        return layout.tiled(ndim) if self.splits_rows else layout.tiled(ndim, None, COLS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PricedPlan(Candidate):
    """A plan, and what it would cost a PE or why it cannot serve."""

    plan: MatmulPlan
    hops: int = 0
    rounds: int = 1  # one after another, each of a share of the rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulProblem:
    """The matrices S = X @ Y (see `tile`) on a wafer, whichever of them is to be computed.

    Sizes are those of the whole matrices; bytes are those of one element.
    """

    form: Form = "nn"
    rows: int  # of X and S
    meeting: int  # columns of X, rows of Y
    columns: int  # of Y and S
    x_bytes: int
    y_bytes: int
    s_bytes: int
    x_copies: int = 1  # leading dimensions on one wafer
    y_copies: int = 1
    batched: bool = False
    wafer: Wafer

    @classmethod
    def of(cls, form: Form, a: Described, bs: Sequence[Described], wafer: Wafer) -> "MatmulProblem":
        """The problem of multiplying `a` by all `bs`, which are moved as one factor."""
        leading = a.shape[:-2] or bs[0].shape[:-2]
        copies = math.prod(leading[1:]) * -(-leading[0] // wafer.wafers) if leading else 1
        width_b = sum(b.shape[-2 if form == "nt" else -1] for b in bs)
        rows, columns_a = a.shape[-2:]
        meeting, columns = (width_b, columns_a) if form == "nt" else (columns_a, width_b)
        size_a, size_b = a.dtype.itemsize, bs[0].dtype.itemsize
        # The result has a's dtype.
        size = dict(zip(ROLES[form], (size_a, size_b, size_a), strict=True))
        return cls(
            form=form,
            rows=rows,
            meeting=meeting,
            columns=columns,
            x_bytes=size["X"],
            y_bytes=size["Y"],
            s_bytes=size["S"],
            x_copies=copies,
            y_copies=copies if form == "tn" or len(bs[0].shape) > 2 else 1,
            batched=bool(leading),
            wafer=wafer,
        )

    @property
    def x(self) -> int:
        """Bytes of a PE's tile of X."""
        return self.x_copies * self._tile(self.rows, self.meeting) * self.x_bytes

    @property
    def y(self) -> int:
        """Bytes of a PE's tile of Y."""
        return self.y_copies * self._tile(self.meeting, self.columns) * self.y_bytes

    @property
    def s(self) -> int:
        """Bytes of a PE's tile of S."""
        return self.x_copies * self._tile(self.rows, self.columns) * self.s_bytes

    @property
    def reflected_bytes(self) -> tuple[int, int, int]:
        """Bytes of the tiles of two factors that lie as those of X @ Y, and of the reflected one.

        In `a @ b^T` and `a^T @ b` one factor is reflected in the diagonal of a square grid. Then
        the meeting dimension lies along x in the left one and along y in the right one.
        """
        if self.form == "nn":
            return self.x, self.y, 0
        return (self.s, self.y, self.y) if self.form == "nt" else (self.x, self.s, self.x)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a row of X's tiles and a column of Y's."""
        return self.wafer.width * self.x + self.wafer.height * self.y

    @property
    def gathers_little(self) -> bool:
        """Whether what `allgather` gathers is little enough for the machine."""
        limit = gather_limit(self.wafer)
        if self.wafer.platform == "cpu":
            limit = min(limit, _GATHERED_BYTES)
        return self.gathered_bytes <= limit

    @property
    def on_accelerators(self) -> bool:
        """Whether it is for TPUs or GPUs, one PE each."""
        return on_accelerators(self.wafer)

    @property
    def arithmetic_seconds(self) -> float | None:
        """What the product takes a PE at its peak; None where that is not known."""
        chip, dtype_bytes = self._chip, min(self.x_bytes, self.s_bytes)
        if chip is None:
            return None
        # A TPU multiplies float32 as bfloat16 unless it is asked for more.
        narrow = dtype_bytes == 2 or chip.float32_flops is None
        peak = chip.bfloat16_flops if narrow else chip.float32_flops
        assert peak is not None
        return 2 * self.x_copies * self._tile(self.rows, self.columns) * self.meeting / peak

    @property
    def link_bytes_per_second(self) -> float | None:
        """The rate of one link in one direction; None where it is not known."""
        return None if self._chip is None else self._chip.link_bytes_per_second

    @property
    def _chip(self) -> Accelerator | None:
        return accelerator(self.wafer.device_kind or "") if self.on_accelerators else None

    def price(
        self,
        plan: MatmulPlan,
        *,
        words: float,
        steps: int,
        hops: int,
        held_bytes: float,
        overlaps: bool = True,
        wafers: int = 1,
        rounds: int = 1,
        seconds: float | None = None,
        note: str = "",
    ) -> PricedPlan:
        """`plan` with its costs, and on a wafer with the cycles that are predicted from them.

        Args:
          overlaps: whether it multiplies while words move.
          wafers: how many wafers share the arithmetic.
          seconds: on accelerators; by default the arithmetic, and then every word.
        """
        if seconds is None and self.arithmetic_seconds is not None and self.link_bytes_per_second:
            moves = words * WORD_BYTES / self.link_bytes_per_second
            seconds = self.arithmetic_seconds / wafers + moves
        return PricedPlan(
            plan=plan,
            words=words,
            steps=steps,
            hops=hops,
            held_bytes=held_bytes,
            cycles=self._cycles(words, steps, hops, overlaps, wafers),
            seconds=seconds,
            rounds=rounds,
            note=note,
        )

    def _cycles(
        self, words: float, steps: int, hops: int, overlaps: bool, wafers: int
    ) -> float | None:
        machine = self.wafer.machine
        if machine is None:
            return None
        products = self.x_copies * self._tile(self.rows, self.columns) * self.meeting
        dtype = "float16" if min(self.x_bytes, self.s_bytes) == 2 else "float32"
        arithmetic = products / machine.fmacs_per_cycle(dtype) / wafers
        moves = words * WORD_BYTES / machine.link_bytes_per_cycle
        # The router moves words while the core multiplies, unless the core waits for all of them.
        busy = max(arithmetic, moves) if overlaps else arithmetic + moves
        return busy + hops * machine.hop_cycles + steps * (2 * machine.ramp_cycles + 1)

    def _tile(self, rows: int, columns: int) -> int:
        return -(-rows // self.wafer.height) * -(-columns // self.wafer.width)
