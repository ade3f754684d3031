"""This file is the 25-point wave stencil, a column of cells to a PE.

M. Jacquelin, M. Araya-Polo and J. Meng, "Scalable Distributed High-Order Stencil Computations",
SC 2022. What comes from the four neighbors on either side, along both axes of the grid, is
multiplied as it arrives and added up once all is there; the third dimension lies in a PE.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from wsekern import fabric
from wsekern.kernels.stencil.finite_differences import difference_coefficients
from wsekern.wafer.wafer import Wafer

RADIUS = 4
_COLUMNS = P("y", "x", None)


def wave(u: jax.Array, before: jax.Array, speed: jax.Array, steps: int, wafer: Wafer) -> jax.Array:
    """`u` after `steps` steps, zero beyond the edges.

    Args:
      u: [height, width, nz], a column to a PE.
      before: `u` one step earlier.
      speed: (velocity * time step / spacing) squared, of each cell.
      steps: how many.
      wafer: a grid of height x width PEs.
    """

    def per_pe(u, before, speed):
        def step(carry, _):
            column, before = carry
            new = _next(column, before, speed[0, 0])
            u = column[RADIUS:-RADIUS]
            return (lax.dynamic_update_slice(column, new, (RADIUS,)), u), None

        column = jnp.pad(u[0, 0], RADIUS)
        (column, _), _ = lax.scan(step, (column, before[0, 0]), length=steps)
        return column[None, None, RADIUS:-RADIUS]

    run = wafer.map(per_pe, in_specs=(_COLUMNS,) * 3, out_specs=_COLUMNS)
    return run(u, before, speed)


def _next(column, before, speed):
    u = column[RADIUS:-RADIUS]
    _, weights = difference_coefficients(2, 2 * RADIUS)
    arrived = []
    for along in ("y", "x"):
        for by in (1, -1):
            near = u
            for weight in weights[RADIUS + 1 :]:
                near = fabric.shift(near, along, by, periodic=False)
                arrived.append(near * weight)
    arrived = lax.optimization_barrier(arrived)
    total = u * (3 * weights[RADIUS])
    for part in arrived:
        total = total + part
    for far, weight in enumerate(weights):
        if far != RADIUS:
            total = total + column[far : far + u.size] * weight
    return 2 * u - before + speed * total
