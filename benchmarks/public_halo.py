"""The halo exchange of the PyPI package `jaxdecomp`: a peer for `stencil`.

W. Kabalan and F. Lanusse, "JAX bindings for the NVIDIA cuDecomp library", 2023. It is timed if it
is installed: `pip install -e '.[bench]' -c constraints.txt`.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from benchmarks import plain_stencil


def exchange(wafer: Any, width: int) -> Callable | None:
    """Its periodic exchange of a 2-D field on a wafer of devices; None if not installed."""
    if importlib.util.find_spec("jaxdecomp") is None:
        return None
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P
    from jaxdecomp import halo_exchange

    spec = P("y", "x")
    # It takes three dimensions, and reads the mesh from the operand's sharding.
    laid = NamedSharding(wafer.device_mesh, P("y", "x", None))

    def pad_locally(u):
        pad = functools.partial(jnp.pad, pad_width=[(width, width), (width, width), (0, 0)])
        return jax.shard_map(pad, mesh=wafer.device_mesh, in_specs=laid.spec, out_specs=laid.spec)(
            u
        )

    def run(u):
        wide = jax.lax.with_sharding_constraint(pad_locally(u[..., None]), laid)
        out = halo_exchange(wide, (width, width), (True, True))
        out = jax.lax.with_sharding_constraint(out, laid)
        return jax.lax.with_sharding_constraint(out[..., 0], NamedSharding(wafer.device_mesh, spec))

    return run


def step_by_exchange(wafer: Any, name: str, steps: int, depth: int) -> Callable | None:
    """Steps of the periodic 5-point or 9-point stencil, `depth` of them after each exchange."""
    exchanged = exchange(wafer, depth)
    if exchanged is None:
        return None
    import jax
    from jax.sharding import PartitionSpec as P

    def some(v):
        for _ in range(depth):
            v = plain_stencil.UPDATES[name](v)
        return v

    spec = P("y", "x")
    update = jax.shard_map(some, mesh=wafer.device_mesh, in_specs=spec, out_specs=spec)
    return lambda u: jax.lax.fori_loop(0, steps // depth, lambda _, u: update(exchanged(u)), u)
