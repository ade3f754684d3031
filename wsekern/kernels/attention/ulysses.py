"""This file is attention with whole sequences: an all-to-all deals the heads out instead.

Public per-PE functions. S. A. Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling
Training of Extreme Long Sequence Transformer Models", 2023.
"""

from typing import Any

import jax

from wsekern import fabric
from wsekern.wafer.axes import ROWS


def by_heads(x: Any) -> Any:
    """Tiles `[B, Tt, Nt, ...]`, of a part of the sequence, as `[B, T, Nt/p, ...]`, of few heads."""
    return jax.tree.map(lambda t: fabric.all_to_all(t, ROWS, split=2, concat=1), x)


def by_sequence(x: Any) -> Any:
    """The inverse of `by_heads`."""
    return jax.tree.map(lambda t: fabric.all_to_all(t, ROWS, split=1, concat=2), x)
