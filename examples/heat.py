"""Heat in a plate of copper, from two lines of user code, with a picture.

    python examples/heat.py --wafer 2x4    on 8 devices, emulated if need be
    python examples/heat.py --virtual 8x8  on virtual PEs, on one device
    python examples/heat.py --estimate     only print what a wafer would take

Needs the extra `viz`.
"""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("heat.py")  # before slow imports

import functools

import numpy as np
from pictures import Panel, picture
from where import check_out, flags, number, print_estimate, run, wafer_of

import wsekern as wk
from wsekern.progress import show_progress

WIDTH = 0.1  # side of the plate, m
CELLS, TILE = 256, 32  # cells along the plate; along each PE's tile in an estimate
DIFFUSIVITY = 1.1e-4  # of copper, m^2/s
SHARE = 0.2  # of the difference to a neighbor that a cell takes over in a step; stable up to 1/4


def main() -> None:
    parser = flags(__doc__, "heat.png")
    number(parser, "--cells", CELLS, "cells along a side", per_pe=TILE)
    number(parser, "--steps", 1500, "time steps")
    arguments = parser.parse_args()
    wafer = wafer_of(arguments)
    if arguments.estimate:
        estimate(arguments.cells or TILE * max(wafer.height, wafer.width), arguments.steps, wafer)
        return
    check_out(arguments.out)
    every = max(1, arguments.steps // 3)
    with wafer, show_progress(f"heat: {arguments.steps:,} steps"):
        start = plate(arguments.cells or CELLS)
        snapshots = np.asarray(diffuse(start, steps=arguments.steps, save_every=every)[1])
    change = float(snapshots[-1].mean() / start.mean()) - 1
    print(f"after {arguments.steps} steps the plate holds {change:+.1e} more heat than at first")
    draw(np.asarray(start), snapshots, every, arguments.out)
    print(f"drawn to {arguments.out}")


def step(u):
    """The temperature one time step later; `u` is a tile with a halo of one cell."""
    around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
    return u[1:-1, 1:-1] + SHARE * (around - 4 * u[1:-1, 1:-1])


def diffuse(u, steps: int, save_every: int | None = None):
    """The temperature of an insulated plate after `steps` steps, and any snapshots on the way."""
    return wk.stencil(u, step, radius=1, boundary="edge", steps=steps, save_every=save_every)


def estimate(cells: int, steps: int, wafer: wk.Wafer) -> None:
    """Prints what the steps cost on `wafer`, and on GPUs that launch one kernel a step."""
    import jax

    start = jax.eval_shape(lambda: plate(cells))
    run = functools.partial(diffuse, steps=steps)
    print(f"{cells:,} x {cells:,} cells, {steps:,} steps\n")
    with wafer:
        print_estimate(run, start, wafer=wafer, launches=steps)


def plate(cells: int):
    """A plate at 20 degrees with a hot ring and a cold bar in it, `[cells, cells]`."""
    import jax.numpy as jnp

    middle = (jnp.arange(cells) + 0.5) / cells - 0.5
    y, x = middle[:, None], middle[None]
    ring = jnp.abs(jnp.hypot(x + 0.12, y - 0.1) - 0.2) < 0.035
    bar = (jnp.abs(x - 0.22) < 0.18) & (jnp.abs(y + 0.3) < 0.05)
    return jnp.where(ring, 100.0, jnp.where(bar, -20.0, 20.0)).astype(jnp.float32)


def draw(start, snapshots, every: int, path: str) -> None:
    """Draws the plate at the start and after each `every` steps."""
    milliseconds = 1000 * SHARE * (WIDTH / start.shape[0]) ** 2 / DIFFUSIVITY
    side = 1000 * WIDTH
    panels = [
        Panel(
            values=frame,
            extent=(0, side, 0, side),
            title=f"step {i * every:,}: {i * every * milliseconds:.3g} ms",
            x="x (mm)",
            y="y (mm)",
            colors="inferno",
            unit="temperature (°C)",
            limits=(-20, 100),
        )
        for i, frame in enumerate([start, *snapshots][:4])
    ]
    picture(path, panels, columns=len(panels), size=(12, 3.2))


if __name__ == "__main__":
    run(main)
