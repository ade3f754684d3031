"""This file is which row of PEs holds which tokens of a cache that stays balanced by shifting.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025: rows pass their
oldest entry up when the row below is as full. Everything follows from a sequence's length alone:
its tokens lie in order, the oldest in the northernmost row that holds any; rows hold equally many,
but for the southernmost ones, which hold one more if the tokens do not divide. A row keeps token t
in its slot `t mod slots`, so a token that moves up keeps its slot, and none moves within a PE.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """How the tokens of a sequence are shared out over rows of PEs."""

    rows: int
    most: int  # tokens held of one sequence
    slides: bool  # whether the oldest token makes room where so many are held

    @property
    def slots(self) -> int:
        """How many tokens one PE has room for."""
        return -(-self.most // self.rows)

    def first(self, lengths: Int[Array, "B"], row: jax.Array | int) -> Int[Array, "B"]:
        """The position of the first token that `row` holds; the row holds all up to the next's.

        Args:
          lengths: the tokens seen of each sequence.
          row: from 0; the number of rows gives the end of the last one.
        """
        held = jnp.minimum(lengths, self.most) if self.slides else lengths
        each, more = held // self.rows, held % self.rows
        return lengths - held + row * each + jnp.maximum(row + more - self.rows, 0)

    def offsets(self, lengths: Int[Array, "B"], row: jax.Array | int) -> Int[Array, "B slots"]:
        """How far behind `row`'s first token each slot's token is; no token where that is too far.

        The token of a slot has the position `first + offset`, if the row holds as many.
        """
        first = self.first(lengths, row)
        return (jnp.arange(self.slots)[None] - first[:, None]) % self.slots

    def grown(
        self, lengths: Int[Array, "B"], active: Bool[Array, "B"], tokens: int
    ) -> Int[Array, "B"]:
        """The lengths after so many new tokens of each active sequence that has room for them."""
        longer = lengths + tokens
        longer = longer if self.slides else jnp.minimum(longer, self.most)
        return jnp.where(active, longer, lengths)
