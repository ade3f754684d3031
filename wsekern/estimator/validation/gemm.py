"""This file is the dense float32 product that the public SpMM benchmarks of a CS-2 compare with.

A tile of the left factor stays on each PE, which multiplies it with the rows of the right factor
that it meets; the products are summed along x.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P

from wsekern import fabric
from wsekern.wafer.wafer import Wafer


def dense(a: jax.Array, b: jax.Array, wafer: Wafer) -> jax.Array:
    """`a @ b`, `a` laid out over the grid and `b` along x; the sums are chains toward the west."""

    def per_pe(a, b):
        return fabric.reduce(a @ b, "x", algorithm="chain")[None]

    run = wafer.map(per_pe, in_specs=(P("y", "x"), P("x", None)), out_specs=P("x", "y", None))
    return run(a, b)[0]
