"""The 25-point wave stencil, with a column of cells on each PE.

M. Jacquelin, M. Araya-Polo and J. Meng, "Scalable Distributed High-Order Stencil Computations",
SC 2022. Columns arrive from four PEs on either side along both axes of the grid. Each is multiplied
by its weight as it arrives, and all are added up once they are there. The third dimension lies
within a PE.
"""

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from wsekern import fabric
from wsekern.kernels.stencil.finite_differences import difference_coefficients
from wsekern.wafer.wafer import Wafer

RADIUS = 4
_COLUMNS = P("y", "x", None)
_State = tuple[Array, Array]  # the padded column, and the column one step earlier


def wave(
    u: Float[Array, "height width nz"],
    before: Float[Array, "height width nz"],
    speed: Float[Array, "height width nz"],
    steps: int,
    wafer: Wafer,
) -> Float[Array, "height width nz"]:
    """`u` after `steps` steps, with zeros beyond the edges.

    Args:
      u: the field, a column of nz cells on each PE.
      before: the field one step earlier.
      speed: (velocity * time step / spacing) squared, of each cell.
      steps: how many.
      wafer: a grid of height x width PEs.
    """

    def per_pe(
        u: Float[Array, "1 1 nz"], before: Float[Array, "1 1 nz"], speed: Float[Array, "1 1 nz"]
    ) -> Float[Array, "1 1 nz"]:
        def step(carry: _State, _: None) -> tuple[_State, None]:
            column, before = carry
            new = _next(column, before, speed[0, 0])
            u = column[RADIUS:-RADIUS]
            return (lax.dynamic_update_slice(column, new, (RADIUS,)), u), None

        # The column keeps its padding from step to step: only its inner cells are written.
        column = jnp.pad(u[0, 0], RADIUS)
        (column, _), _ = lax.scan(step, (column, before[0, 0]), length=steps)
        return column[None, None, RADIUS:-RADIUS]

    run = wafer.map(per_pe, in_specs=(_COLUMNS,) * 3, out_specs=_COLUMNS)
    return run(u, before, speed)


def _next(
    column: Float[Array, " padded"], before: Float[Array, " nz"], speed: Float[Array, " nz"]
) -> Float[Array, " nz"]:
    u = column[RADIUS:-RADIUS]
    _, weights = difference_coefficients(2, 2 * RADIUS)
    arrived = []
    for along in ("y", "x"):
        for by in (1, -1):
            near = u
            for weight in weights[RADIUS + 1 :]:
                near = fabric.shift(near, along, by, periodic=False)
                arrived.append(near * weight)
    # Without the barrier the additions would join the multiplications, and each would wait for the
    # column that comes from farthest.
    arrived = lax.optimization_barrier(arrived)
    total = u * (3 * weights[RADIUS])
    for part in arrived:
        total = total + part
    for far, weight in enumerate(weights):
        if far != RADIUS:
            total = total + column[far : far + u.size] * weight
    return 2 * u - before + speed * total
