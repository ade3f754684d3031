"""Ulysses attention: an all-to-all gives each PE whole sequences of a few heads.

Public per-PE functions. S. A. Jacobs et al., "DeepSpeed Ulysses: System Optimizations for Enabling
Training of Extreme Long Sequence Transformer Models", 2023.
"""

from typing import TypeVar

import jax

from wsekern import fabric
from wsekern.wafer.axes import ROWS

Tiles = TypeVar("Tiles")


def split_heads(tiles: Tiles) -> Tiles:
    """From `[B, Tt, Nt, ...]`, a part of the sequence, to `[B, T, Nt/p, ...]`, a part of the heads.

    On p PEs along y; any pytree of tiles.
    """
    return jax.tree.map(lambda t: fabric.all_to_all(t, ROWS, split=2, concat=1), tiles)


def split_sequence(tiles: Tiles) -> Tiles:
    """The inverse of `split_heads`."""
    return jax.tree.map(lambda t: fabric.all_to_all(t, ROWS, split=1, concat=2), tiles)
