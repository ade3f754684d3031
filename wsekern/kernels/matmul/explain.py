"""This file is why `matmul` takes the algorithm it takes, in numbers that print as a table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from wsekern.kernels.matmul import choice, tile
from wsekern.wafer import context
from wsekern.wafer.wafer import Wafer

_COLUMNS = ("algorithm", "words", "steps", "held KiB", "cycles", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `auto` takes for one product, and every algorithm's cost; prints as a table."""

    algorithm: str  # "plain" without a wafer
    why: str
    wafer: Wafer | None
    candidates: dict[str, choice.Candidate]

    def __str__(self) -> str:
        lines = [f"matmul on {self.wafer}: {self.algorithm}, {self.why}"]
        if self.candidates:
            rows = [_COLUMNS, *(self._row(c) for c in self.candidates.values())]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)]
        return "\n".join(lines)

    def _row(self, c: choice.Candidate) -> tuple[str, ...]:
        name = c.plan.algorithm
        if c.refused:
            return name, "", "", "", "", c.refused
        cycles = "" if c.cycles is None else f"{c.cycles:,.0f}"
        remarks = [c.note, "<- auto" if name == self.algorithm else ""]
        remark = ", ".join(r for r in remarks if r)
        return (
            name,
            f"{c.words:,.0f}",
            f"{c.steps:,}",
            f"{c.held_bytes / 1024:,.1f}",
            cycles,
            remark,
        )


def explain_matmul(
    a: Any,
    b: Any,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    dtype: Any = jnp.float32,
    wafer: Wafer | None = None,
) -> Explanation:
    """What `matmul(a, b, algorithm="auto")` takes, and what each algorithm would cost a PE.

    Words (32 bits, received) and dependent steps are of one product; held bytes are what a PE keeps
    of others' tiles at a time; cycles are predicted on wafers. Nothing runs.

    Args:
      a: left factor, or anything with its shape and dtype, or a shape.
      b: right factor, likewise, or a list of them.
      transpose_a: as in `matmul`.
      transpose_b: as in `matmul`.
      dtype: of what is given as a shape.
      wafer: by default the current wafer.

    Raises:
      ValueError: both factors are transposed, or the shapes do not fit one another.
    """
    form = tile.form("explain_matmul", transpose_a, transpose_b)
    a, bs = _described(a, dtype), [_described(x, dtype) for x in (b if _several(b) else [b])]
    for one in bs:
        tile.check("explain_matmul", form, a, one)
    wafer = context.resolve(wafer)
    if wafer is None or 0 in (*a.shape, *(math.prod(x.shape) for x in bs)):
        why = "no wafer of more than one PE is in force, or there is nothing to multiply"
        return Explanation(algorithm="plain", why=why, wafer=wafer, candidates={})
    problem = choice.problem(form, a, bs, wafer)
    best, why = choice.chosen(problem)
    return Explanation(
        algorithm=best.plan.algorithm, why=why, wafer=wafer, candidates=choice.candidates(problem)
    )


def _several(b: Any) -> bool:
    return isinstance(b, list) or (isinstance(b, tuple) and not isinstance(b[0], int))


def _described(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, tuple):
        return jax.ShapeDtypeStruct(x, dtype)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
