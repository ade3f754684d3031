"""An unstable jet in a rotating, shallow sea, with an animation: a small climate.

    python examples/shallow_water.py --wafer 2x4    on 8 devices, emulated if need be
    python examples/shallow_water.py --virtual 4x8  on virtual PEs, on one device
    python examples/shallow_water.py --estimate     only print what a wafer would take

The terms are those of the demonstration of mpi4jax (D. Hafner and F. Vicentini, 2021). Its friction
of v is included as it is there, with differences to u. Needs the extra `viz`.
"""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("shallow_water.py")  # before slow imports

import functools

import numpy as np
from pictures import Panel, both_ways, film
from where import check_out, flags, number, print_estimate, run, wafer_of

import wsekern as wk
from wsekern.progress import show_progress

HEIGHT, LENGTH, TILE = 180, 360, 8  # cells of the sea; along each PE's tile in an estimate
SPACING = 5e3  # m
GRAVITY, DEPTH = 9.81, 100.0  # m/s^2, m
CORIOLIS, BETA = 2e-4, 2e-11  # at the southern wall, 1/s; its growth to the north, 1/(m s)
VISCOSITY = 1e-3 * CORIOLIS * SPACING**2  # m^2/s
STEP = 0.125 * SPACING / (GRAVITY * DEPTH) ** 0.5  # s
NEW, OLD = 1.6, -0.6  # Adams-Bashforth weights of this step's change and the last one's
BOUNDARY = {  # walls in the south and the north; periodic in x
    name: ["zero" if name == "v" else "edge", "periodic"]
    for name in ("eta", "u", "v", "deta", "du", "dv")
}


def main() -> None:
    parser = flags(__doc__, "shallow_water.gif")
    number(parser, "--height", HEIGHT, "cells of the sea from south to north", per_pe=TILE)
    number(parser, "--length", LENGTH, "cells of the sea from west to east", per_pe=TILE)
    number(parser, "--days", 10, "days to compute")
    number(parser, "--frames", 60, "frames of the animation")
    arguments = parser.parse_args()
    wafer = wafer_of(arguments)
    every = max(1, round(arguments.days * 86_400 / STEP / arguments.frames))
    steps = every * arguments.frames
    if arguments.estimate:
        height = arguments.height or TILE * wafer.height
        estimate(height, arguments.length or TILE * wafer.width, steps, wafer)
        return
    check_out(film=arguments.out)
    shape = arguments.height or HEIGHT, arguments.length or LENGTH
    with wafer, show_progress(f"shallow_water: {steps:,} steps"):
        _, frames = sail(jet(*shape), walls(*shape), steps, save_every=every)
        eta = np.asarray(frames["eta"])
    mass = DEPTH * eta[0].size + eta.sum((1, 2), np.float64)
    print(f"mass changed by {abs(mass[-1] / mass[0] - 1):.1e} of itself")
    with show_progress("shallow_water: drawing"):
        animate(eta, every * STEP / 86_400, arguments.out)
    print(f"drawn to {arguments.out}")


def estimate(height: int, length: int, steps: int, wafer: wk.Wafer) -> None:
    """Prints what the steps cost on `wafer`, and on GPUs that launch one kernel a step."""
    import jax

    field = jax.ShapeDtypeStruct((height, length), jax.dtypes.canonicalize_dtype(float))
    sea, land = dict.fromkeys(BOUNDARY, field), jax.eval_shape(lambda: walls(height, length))
    print(f"{height:,} x {length:,} cells, {steps:,} steps\n")
    with wafer:
        run = functools.partial(sail, steps=steps)
        print_estimate(run, sea, land, wafer=wafer, launches=steps)


def sail(sea, land, steps: int, save_every: int | None = None):
    """The sea after `steps` steps.

    Its fields are "eta", the height of the surface over its rest (m); "u" and "v", the velocity
    (m/s) at a cell's eastern and northern face; and the change of each in a second.
    """
    options = {"coefficients": land, "steps": steps, "save_every": save_every}
    return wk.stencil(sea, step, radius=2, boundary=BOUNDARY, **options)


def step(sea, land, step):
    """One time step; the fields are tiles with a halo of two cells."""
    import jax.numpy as jnp

    eta, u, v = sea["eta"], sea["u"], sea["v"]
    north, south, d = land["north"], land["south"], SPACING
    h = land["depth"] + eta
    # Water through the eastern and the northern faces; none goes through a wall.
    fe = 0.5 * (h[:, 1:] + h[:, :-1]) * u[:, :-1]
    fn = 0.5 * (h[1:] + h[:-1]) * v[:-1] * north[:-1]
    corner = 0.25 * (h[:-1, :-1] + h[:-1, 1:] + h[1:, :-1] + h[1:, 1:])
    spin = land["f"][:-1] + (v[:-1, 1:] - v[:-1, :-1] - u[1:, :-1] + u[:-1, :-1]) / d
    q = spin / corner  # potential vorticity
    ke = 0.25 * (u[1:, 1:] ** 2 + u[1:, :-1] ** 2 + v[1:, 1:] ** 2 + v[:-1, 1:] ** 2)
    change = {
        "deta": -(fe[1:-1, 1:] - fe[1:-1, :-1] + fn[1:, 1:-1] - fn[:-1, 1:-1]) / d,
        "du": -GRAVITY * (eta[1:-1, 2:] - eta[1:-1, 1:-1]) / d
        - (ke[:-1, 1:] - ke[:-1, :-1]) / d
        + 0.25 * q[1:, 1:] * (fn[1:, 1:-1] + fn[1:, 2:])
        + 0.25 * q[:-1, 1:] * (fn[:-1, 1:-1] + fn[:-1, 2:]),
        "dv": -GRAVITY * (eta[2:, 1:-1] - eta[1:-1, 1:-1]) / d
        - (ke[1:, :-1] - ke[:-1, :-1]) / d
        - 0.25 * q[1:, 1:] * (fe[1:-1, 1:] + fe[2:, 1:])
        - 0.25 * q[1:, :-1] * (fe[1:-1, :-1] + fe[2:, :-1]),
    }
    new, old = jnp.where(step == 0, 1.0, NEW), jnp.where(step == 0, 0.0, OLD)
    eta, u, v = (
        sea[name][1:-1, 1:-1]
        + STEP * (new * change["d" + name] + old * sea["d" + name][1:-1, 1:-1])
        for name in ("eta", "u", "v")
    )
    v = v * north[1:-1]

    def with_friction(a):
        fe = VISCOSITY * (a[:, 1:] - u[:, :-1]) / d
        fn = VISCOSITY * (a[1:] - u[:-1]) / d
        through = fn[1:, 1:-1] * north[2:-2] - fn[:-1, 1:-1] * south[2:-2]
        return a[1:-1, 1:-1] + STEP * (fe[1:-1, 1:] - fe[1:-1, :-1] + through) / d

    state = {"eta": eta[1:-1, 1:-1], "u": with_friction(u), "v": with_friction(v)}
    return state | {name: value[1:-1, 1:-1] for name, value in change.items()}


def walls(height: int, length: int, depth=DEPTH):
    """Depth of the sea (m), Coriolis parameter (1/s), and which faces are open (1 or 0)."""
    import jax.numpy as jnp

    row = jnp.arange(height)[:, None]
    return {
        "depth": jnp.broadcast_to(jnp.asarray(depth, float), (height, length)),
        "f": (CORIOLIS + BETA * SPACING * row).astype(float),
        "north": (row < height - 1).astype(float),
        "south": (row > 0).astype(float),
    }


def jet(height: int, length: int):
    """An eastward jet, in balance with the slope of the surface, and a ripple that upsets it."""
    import jax.numpy as jnp

    y, x = (
        np.arange(-1, n + 1) * SPACING for n in (height, length)
    )  # with one cell beyond each end
    wide, long = (height - 1) * SPACING, (length - 1) * SPACING
    u = 10 * np.exp(-(((y - 0.5 * wide) / (0.02 * long)) ** 2))[:, None] * np.ones_like(x)
    slope = -SPACING * u * (CORIOLIS + BETA * y)[:, None] / GRAVITY
    balanced = np.cumsum(slope, axis=0)
    ripple = np.sin(x / long * 10 * np.pi) * np.cos(y / wide * 8 * np.pi)[:, None]
    eta = balanced - balanced.mean() + 0.2 * ripple
    fields = {"eta": eta, "u": u} | dict.fromkeys(("v", "deta", "du", "dv"), 0 * u)
    return {name: jnp.asarray(a[1:-1, 1:-1], float) for name, a in fields.items()}


def animate(eta, days: float, path: str) -> None:
    panel = Panel(
        values=eta[0],
        extent=(0, eta.shape[2] * SPACING / 1e3, 0, eta.shape[1] * SPACING / 1e3),
        x="x (km)",
        y="y (km)",
        colors="RdBu_r",
        unit="surface over its mean (m)",
        limits=both_ways(eta),
    )
    film(path, panel, eta, [f"day {(i + 1) * days:.1f}" for i in range(len(eta))])


if __name__ == "__main__":
    run(main)
