"""Which row of PEs holds which tokens of a key-value cache, so that all rows hold equally many.

C. He et al., "WaferLLM: Large Language Model Inference at Wafer Scale", OSDI 2025: a row passes its
oldest entry to the row above when the row below holds as many. Everything follows from a sequence's
length. Its tokens lie in order, the oldest in the northernmost row that holds any. All rows hold
equally many; if that does not divide, the southernmost rows hold one more. A row keeps token t in
its slot `t % slots`, so a token that moves up keeps its slot number, and none moves within a PE.
Three rows, one token after another:

    tokens seen     4       5       6       7
    row 0           0       0       0 1     0 1
    row 1           1       1 2     2 3     2 3
    row 2           2 3     3 4     4 5     4 5 6
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """How the tokens of a sequence are shared out over rows of PEs."""

    rows: int
    max_tokens: int  # of one sequence
    slides: bool  # when full: drop the oldest token for a new one, or take no new one

    @property
    def slots(self) -> int:
        """How many tokens of a sequence one PE has room for."""
        return -(-self.max_tokens // self.rows)

    def first(self, lengths: Int[Array, " B"], row: Int[Array, ""] | int) -> Int[Array, " B"]:
        """The position of the first token that `row` holds; the next row's first is its end.

        Args:
          lengths: the tokens seen of each sequence.
          row: from 0; `rows` gives the end of the last row.
        """
        kept = jnp.minimum(lengths, self.max_tokens) if self.slides else lengths
        each, remainder = kept // self.rows, kept % self.rows
        # The last `remainder` rows hold one more: count those of them that lie before `row`.
        longer = jnp.maximum(row + remainder - self.rows, 0)
        return lengths - kept + row * each + longer

    def offsets(
        self, lengths: Int[Array, " B"], row: Int[Array, ""] | int
    ) -> Int[Array, "B {self.slots}"]:
        """For each slot, how far behind the row's first token the token that belongs there is.

        The slot's token has the position `first + offset`. The slot is empty where that is not
        below the next row's first.
        """
        first = self.first(lengths, row)
        return (jnp.arange(self.slots)[None] - first[:, None]) % self.slots

    def lengths_after(
        self, lengths: Int[Array, " B"], active: Bool[Array, " B"], tokens: int
    ) -> Int[Array, " B"]:
        """The lengths after `tokens` more of each active sequence, as far as it has room."""
        longer = lengths + tokens
        longer = longer if self.slides else jnp.minimum(longer, self.max_tokens)
        return jnp.where(active, longer, lengths)
