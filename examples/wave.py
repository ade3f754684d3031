"""Sound in the ground in three dimensions: a shot, its record, and its sensitivity to the rock.

A 25-point stencil, as in M. Jacquelin et al., "Scalable Distributed High-Order Stencil
Computations", 2022; the depth stays in each PE's memory.

    python examples/wave.py --wafer 2x4    on 8 devices, emulated if need be
    python examples/wave.py --virtual 4x4  on virtual PEs, on one device
    python examples/wave.py --estimate     only print what a wafer would take

The estimate is of the paper's own kernel, with a column of the ground on each PE: the halo of four
cells round a tile of this program is more than a PE can hold. Needs the extra `viz`.
"""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("wave.py")  # before slow imports

import functools

import numpy as np
from pictures import Panel, both_ways, film, picture
from where import check_out, flags, number, print_estimate, run, wafer_of

import wsekern as wk
from wsekern.progress import show_progress

SPACING = 10.0  # m
REACH = 4  # cells: differences of order 8
PITCH = 18.0  # frequency of the shot, Hz
SLOW, FAST = 1500.0, 3400.0  # slowest and fastest rock, m/s
STEP = 0.7 * wk.wave_limit(FAST, [SPACING] * 3, order=2 * REACH)  # s
WEIGHTS = wk.difference_coefficients(2, 2 * REACH)[1]


def main() -> None:
    parser = flags(__doc__, "wave.png")
    number(parser, "--cells", 80, "cells along y and x; half as many in depth")
    number(parser, "--steps", 400, "time steps")
    parser.add_argument("--film", default="wave.gif", help="the animation (default: wave.gif)")
    arguments = parser.parse_args()
    wafer = wafer_of(arguments)
    if arguments.estimate:
        estimate(arguments.steps, wafer)
        return
    check_out(arguments.out, film=arguments.film)
    rock = ground(arguments.cells)
    every = max(1, arguments.steps // 40)
    with wafer:
        with show_progress(f"wave: {arguments.steps:,} steps"):
            _, frames, record = shot(rock, arguments.steps, save_every=every)
            pressure, record = np.asarray(frames["now"]), np.asarray(record)
        with show_progress("wave: the gradient, about nine times the work of the steps"):
            gradient = np.asarray(sensitivity(mean_by_depth(rock), record))
    cut = arguments.cells // 2
    slices = np.asarray(rock[cut]), pressure[:, cut], gradient[cut]
    earth, waves, slope = (np.swapaxes(a, -1, -2) for a in slices)
    with show_progress("wave: drawing"):
        draw(earth, waves, slope, record, every, arguments)
    print(f"drawn to {arguments.out} and {arguments.film}")


def estimate(steps: int, wafer: wk.Wafer) -> None:
    """Prints what the steps cost with a column of 192 cells on each PE, which fills its memory."""
    import jax
    import jax.numpy as jnp

    from wsekern.estimator.validation import wave25

    shape = wafer.height, wafer.width, 192
    u = jax.ShapeDtypeStruct(shape, jnp.float32)
    print("{:,} x {:,} x {} cells, {:,} steps\n".format(*shape, steps))

    def run(now, before, courant):
        return wave25.wave(now, before, courant, steps, wafer)

    print_estimate(run, u, u, u, wafer=wafer, launches=steps)


def step(wave, rock):
    """The pressure one time step later; the fields are tiles with a halo of four cells."""
    p = wave["now"]

    def shift(a, axis=0, by=0):
        starts = [REACH + by * (d == axis) for d in range(3)]
        return a[tuple(slice(i, i + n - 2 * REACH) for i, n in zip(starts, a.shape, strict=True))]

    bend = sum(w * shift(p, d, i - REACH) for d in range(3) for i, w in enumerate(WEIGHTS))
    damping = shift(rock["damping"])
    undriven = 2 * shift(p) - (1 - damping) * shift(wave["before"])
    return {"now": (undriven + shift(rock["courant"]) * bend) / (1 + damping), "before": shift(p)}


def shot(velocity, steps: int, save_every: int | None = None, checkpoint: str | None = None):
    """A shot into rock of `velocity` (m/s, `[y, x, depth]`).

    Returns the last fields; with `save_every`, snapshots of them; and the record at the surface,
    `[steps, x]`.
    """
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    y, x, _ = velocity.shape
    silent = jnp.zeros_like(velocity)
    late = np.pi * PITCH * (np.arange(steps) * STEP - 1.2 / PITCH)
    ricker = ((1 - 2 * late**2) * np.exp(-(late**2))).astype(np.float32)
    places = [(y // 2, column, 3) for column in range(x)]
    return wk.stencil(
        {"now": silent, "before": silent},
        step,
        radius=(REACH,) * 3,
        boundary="zero",
        steps=steps,
        coefficients={
            "courant": (velocity * STEP / SPACING) ** 2,
            "damping": sponge(velocity.shape),
        },
        sources=wk.Sources(at=[(y // 2, x // 2, 3)], values=ricker[:, None], field="now"),
        receivers=wk.Receivers(at=places, field="now"),
        save_every=save_every,
        checkpoint=checkpoint,
        spec=P("y", "x"),
    )


def sensitivity(velocity, record):
    """The gradient, with respect to `velocity`, of half the squared misfit to `record`."""
    import jax

    def misfit(velocity):
        predicted = shot(velocity, len(record), checkpoint="sqrt")[1]
        return 0.5 * ((predicted - record) ** 2).sum()

    return jax.jit(jax.grad(misfit))(velocity)


def ground(cells: int):
    """Velocity in dipping layers with a lens of fast rock, `[y, x, depth]`, m/s."""
    import jax.numpy as jnp

    sizes = cells, cells, cells // 2
    y, x, z = np.meshgrid(*(np.arange(n) / cells for n in sizes), indexing="ij")
    layers = SLOW + 900 * (z + 0.1 * x > 0.2) + 500 * (z - 0.08 * x > 0.3)
    lens = ((x - 0.55) / 0.14) ** 2 + ((y - 0.5) / 0.2) ** 2 + ((z - 0.27) / 0.05) ** 2 < 1
    return jnp.asarray(np.where(lens, FAST, layers), jnp.float32)


def mean_by_depth(velocity):
    """A rough guess of the ground: the mean at each depth."""
    import jax.numpy as jnp

    return jnp.broadcast_to(velocity.mean((0, 1), keepdims=True), velocity.shape)


def sponge(shape):
    """Damping within 14 cells of the sides and the bottom, so that no wave comes back."""
    import jax.numpy as jnp

    y, x, z = np.ogrid[tuple(slice(n) for n in shape)]
    sides = [np.minimum(i, n - 1 - i) for i, n in zip((y, x), shape, strict=False)]
    near = np.minimum(np.minimum(*sides), shape[2] - 1 - z)
    return jnp.asarray(0.12 * np.maximum(0, 1 - near / 14) ** 2, jnp.float32)


def draw(rock, frames, gradient, record, every: int, arguments) -> None:
    """Draws slices `[depth, x]` of the rock, the wave and the gradient, and the record."""
    half, long = frames[len(frames) // 2], rock.shape[1] * SPACING
    pressure = "pressure (peak of the shot = 1)"
    earth = functools.partial(Panel, extent=(0, long, rock.shape[0] * SPACING, 0), y="depth (m)")
    wave = functools.partial(
        earth, colors="RdBu_r", unit=pressure, limits=both_ways(half, 0.99), behind=rock
    )
    slope = functools.partial(earth, colors="PuOr_r", limits=both_ways(gradient, 0.99))
    time = functools.partial(
        Panel, extent=(0, long, len(record) * STEP, 0), y="time (s)", aspect="auto"
    )
    panels = [
        earth(values=rock, title="velocity of sound", unit="m/s"),
        wave(values=half, title=f"the wave after {len(record) // 2 * STEP:.2f} s"),
        time(
            values=record, title="the record, along the surface", colors="gray", unit=pressure,
            limits=both_ways(record, 0.95),
        ),
        slope(
            values=gradient, title="gradient of the misfit by the velocity", unit="misfit per m/s"
        ),
    ]  # fmt: skip
    picture(arguments.out, panels, columns=2, size=(11, 6))
    titles = [f"{(i + 1) * every * STEP:.2f} s" for i in range(len(frames))]
    film(arguments.film, wave(values=half), frames, titles)


if __name__ == "__main__":
    run(main)
