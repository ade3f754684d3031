"""The dense float32 product with which the public SpMM benchmarks of a CS-2 compare.

A tile of the left factor stays on each PE, which multiplies it by its rows of the right factor; the
products are summed along x.
"""

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.wafer.wafer import Wafer


def dense(a: Float[Array, "M K"], b: Float[Array, "K N"], wafer: Wafer) -> Float[Array, "W M N"]:
    """`a @ b`, summed along x by chains toward the west, where it stays: in the first of W parts.

    Args:
      a: laid out over the grid.
      b: its rows are laid out along x.
      wafer: the grid, with W columns of PEs.
    """

    def per_pe(a: Float[Array, "Mt Kt"], b: Float[Array, "Kt N"]) -> Float[Array, "1 Mt N"]:
        return fabric.reduce(a @ b, "x", algorithm="chain")[None]

    run = wafer.map(per_pe, in_specs=(P("y", "x"), P("x", None)), out_specs=P("x", "y", None))
    return run(a, b)
