"""Poisson's equation on a square with cold walls, by BiCGStab and by multigrid, with a picture.

    python examples/poisson.py --wafer 2x4    on 8 devices, emulated if need be
    python examples/poisson.py --virtual 8x8  on virtual PEs, on one device
    python examples/poisson.py --estimate     only print what a wafer would take

The estimate is for as many iterations as one device takes; from 256 cells on, BiCGStab's grow with
the cells along a side, and multigrid's do not. Needs the extra `viz`.
"""

from wsekern.interrupts import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt("poisson.py")  # before slow imports

import functools

from where import check_out, flags, number, print_estimate, run, wafer_of

import wsekern as wk
from wsekern.progress import show_progress

CELLS, TILE = 256, 16  # cells along the square; along each PE's tile in an estimate
SOLVED = 256  # cells along a side whose iterations are counted for an estimate


def main() -> None:
    parser = flags(__doc__, "poisson.png")
    number(parser, "--cells", CELLS, "cells along a side", per_pe=TILE)
    arguments = parser.parse_args()
    wafer = wafer_of(arguments)
    if arguments.estimate:
        estimate(arguments.cells or TILE * max(wafer.height, wafer.width), wafer)
        return
    check_out(arguments.out)
    with wafer, show_progress("poisson: solving twice"):
        solutions, error = solve(arguments.cells or CELLS)
    for name, s in solutions.items():
        print(f"{name:9} {int(s.iterations):4d} iterations, {s.why}, residual {s.residual:.2e}")
    print(f"largest error against the exact solution: {error:.2e}")
    draw(solutions, arguments.out)
    print(f"drawn to {arguments.out}")


def solve(cells: int):
    """Both solutions of a problem with a known solution, and the largest error of multigrid's."""
    import jax
    import jax.numpy as jnp

    b, exact = problem(cells)
    run = jax.jit(lambda b: {name: solver(b) for name, solver in solvers(cells).items()})
    solutions = run(b)
    return solutions, float(jnp.abs(solutions["multigrid"].x - exact).max())


def estimate(cells: int, wafer: wk.Wafer) -> None:
    """Prints what each solver costs; it takes the same number of iterations on every wafer."""
    import jax

    b, _ = jax.eval_shape(lambda: problem(cells))
    with show_progress("poisson: counting iterations"):
        solutions, _ = solve(min(cells, SOLVED))
    growth = {"BiCGStab": max(1, cells / SOLVED), "multigrid": 1}
    for name, solution in solutions.items():
        trips = round(int(solution.iterations) * growth[name])
        print(f"{name}, {cells:,} x {cells:,} cells, {trips:,} iterations\n")
        launches = trips * launches_of_iteration(cells)[name]
        print_estimate(solvers(cells)[name], b, wafer=wafer, launches=launches, trips=trips)
        print()


def launches_of_iteration(cells: int) -> dict[str, int]:
    """The kernels that a GPU launches at least in an iteration of each solver.

    BiCGStab: two applications, each with its scalar products, and the new solution. Multigrid: on
    each grid four sweeps, the residual taken to the next grid, and the correction brought back.
    """
    return {"BiCGStab": 3, "multigrid": 6 * max(1, cells.bit_length() - 1)}


def problem(cells: int):
    """The right side, times the square of a cell's side, and the exact solution."""
    import jax.numpy as jnp

    middle = (jnp.arange(cells) + 0.5) / cells

    def wave(count: int, growth: float):
        """exp(growth t) sin(count pi t), which is zero at both walls, and its second derivative."""
        sine, cosine = jnp.sin(count * jnp.pi * middle), jnp.cos(count * jnp.pi * middle)
        bend = (growth**2 - (count * jnp.pi) ** 2) * sine + 2 * growth * count * jnp.pi * cosine
        return jnp.exp(growth * middle) * sine, jnp.exp(growth * middle) * bend

    (y, y_bend), (x, x_bend) = wave(2, -1.0), wave(1, 1.5)
    source = -jnp.outer(y, x_bend) - jnp.outer(y_bend, x)
    return source / cells**2, jnp.outer(y, x)


def laplacian(level: int):
    """Minus the five-point Laplacian, zero on the walls, on cells `level` times as wide."""

    def update(u):
        around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
        return (4 * u[1:-1, 1:-1] - around) / level**2

    return functools.partial(
        wk.stencil, update=update, radius=1, boundary=lambda near: -near, corners=False
    )


def solvers(cells: int):
    """Name of a solver -> function from the right side to its solution."""
    # Float32 cannot resolve a residual much smaller than this beside the right side.
    tolerance = max(1e-4, 6e-8 * cells**2)

    def bicgstab(b):
        return wk.bicgstab(laplacian(1), b, tolerance=tolerance, max_iterations=2000)

    def multigrid(b):
        diagonal_at = lambda level: 4 / level**2  # noqa: E731
        return wk.multigrid(laplacian, b, diagonal_at=diagonal_at, tolerance=tolerance)

    return {"BiCGStab": bicgstab, "multigrid": multigrid}


def draw(solutions, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    u = np.asarray(solutions["multigrid"].x)
    most = np.abs(u).max()
    image = left.imshow(
        u, cmap="RdBu_r", vmin=-most, vmax=most, origin="lower", extent=(0, 1, 0, 1)
    )
    left.set(title="solution", xlabel="x", ylabel="y")
    figure.colorbar(image, ax=left, label="u")
    for name, s in solutions.items():
        residuals = np.asarray(s.residuals)[: int(s.iterations) + 1]
        label = f"{name}: {int(s.iterations)} iterations"
        right.semilogy(residuals / residuals[0], label=label)
    right.set(title="residual", xlabel="iteration", ylabel="norm of the residual / first one")
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
