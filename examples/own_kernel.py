"""A kernel of one's own: heat spreads over a plate, one tile of it on each PE.

Run it as `python examples/own_kernel.py`; docs/own_kernel.md explains it line by line.
"""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("own_kernel.py")  # before slow imports

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import wsekern as wk
from wsekern import fabric

PLATE = P("y", "x")


def heat(u: Float[Array, "Ht Wt"], steps: int) -> Float[Array, "Ht Wt"]:
    """This PE's tile of the plate after `steps` explicit Euler steps; the rim is held at 0."""

    def step(_, u):
        # Each neighbor's facing edge; a PE at the rim of the wafer gets zeros.
        north = fabric.shift(u[-1:], "y", +1, periodic=False)
        south = fabric.shift(u[:1], "y", -1, periodic=False)
        west = fabric.shift(u[:, -1:], "x", +1, periodic=False)
        east = fabric.shift(u[:, :1], "x", -1, periodic=False)
        above, below = jnp.concatenate([north, u[:-1]]), jnp.concatenate([u[1:], south])
        left, right = jnp.hstack([west, u[:, :-1]]), jnp.hstack([u[:, 1:], east])
        return u + 0.2 * (above + below + left + right - 4 * u)

    return jax.lax.fori_loop(0, steps, step, u)


def spread(u: Float[Array, "H W"], wafer: wk.Wafer, steps: int = 10) -> Float[Array, "H W"]:
    """The whole plate after `steps` steps, on any wafer whose grid divides it."""
    return wafer.map(functools.partial(heat, steps=steps), in_specs=PLATE, out_specs=PLATE)(u)


def plain(u: Float[Array, "H W"], steps: int = 10) -> Float[Array, "H W"]:
    """What `spread` must equal: the same steps over the whole plate at once."""

    def step(_, u):
        v = jnp.pad(u, 1)
        around = v[:-2, 1:-1] + v[2:, 1:-1] + v[1:-1, :-2] + v[1:-1, 2:]
        return u + 0.2 * (around - 4 * u)

    return jax.lax.fori_loop(0, steps, step, u)


def main() -> None:
    """Runs the kernel on emulated devices, on a mesh made elsewhere, and on 4,096 virtual PEs."""
    wk.emulate_devices(8)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    wafers = {
        "2x4 devices": wk.Wafer.devices(height=2, width=4),
        "a mesh of one's own": wk.Wafer.of(mesh, y="data", x="model"),
        "64x64 virtual PEs": wk.Wafer.virtual(wk.WSE2, height=64, width=64),
    }
    plate = jax.random.uniform(jax.random.key(0), (128, 128))
    energy = lambda run: lambda u: jnp.sum(run(u) ** 2)  # noqa: E731
    want = jax.jit(plain)(plate), jax.jit(jax.grad(energy(plain)))(plate)
    for name, wafer in wafers.items():
        run = functools.partial(spread, wafer=wafer)
        got = jax.jit(run)(plate), jax.jit(jax.grad(energy(run)))(plate)
        same = [bool(jnp.allclose(g, w, atol=1e-5)) for g, w in zip(got, want, strict=True)]
        print(f"{name:20} heat left {jnp.sum(got[0]):.1f}, as in plain jnp {same}")


if __name__ == "__main__":
    from where import run

    run(main)
