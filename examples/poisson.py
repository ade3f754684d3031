"""Poisson's equation on a square with cold walls, by BiCGStab and by multigrid, with a picture.

`python examples/poisson.py --wafer 2x4` runs on eight devices, emulated where there are none;
`--virtual 8x8` on virtual PEs. Needs the extra `viz`.
"""

import argparse
import functools

import wsekern as wk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--wafer", default="2x4", help="HEIGHTxWIDTH devices (default: 2x4)")
    where.add_argument("--virtual", metavar="HEIGHTxWIDTH", help="virtual PEs of a WSE-2 instead")
    parser.add_argument("--cells", type=int, default=256, help="along a side (default: 256)")
    parser.add_argument("--out", default="poisson.png", help="the picture")
    asked = parser.parse_args()
    height, width = map(int, (asked.virtual or asked.wafer).split("x"))
    if not asked.virtual:
        wk.emulate_devices(height * width)  # before jax starts; real ones are taken where they are

    wafer = (
        wk.Wafer.virtual(wk.WSE2, height, width)
        if asked.virtual
        else wk.Wafer.devices(height, width)
    )
    with wafer:
        solutions, error = solve(asked.cells)
    for name, s in solutions.items():
        print(f"{name:9} {int(s.iterations):4d} iterations, {s.why}, residual {s.residual:.2e}")
    print(f"largest error against the exact solution: {error:.2e}")
    draw(solutions, asked.out)
    print(f"drawn to {asked.out}")


def solve(cells: int):
    """Both solutions of a problem whose exact one is known, and the error of the second."""
    import jax
    import jax.numpy as jnp

    middle = (jnp.arange(cells) + 0.5) / cells
    y, x = middle[:, None], middle[None]
    # Of sin(pi x) sin(2 pi y) + sin(3 pi x) sin(pi y) / 3, which is zero on all walls.
    waves = [(1, 2, 1.0), (3, 1, 1 / 3)]
    modes = [
        (a, jnp.sin(kx * jnp.pi * x) * jnp.sin(ky * jnp.pi * y), kx, ky) for kx, ky, a in waves
    ]
    exact = sum(a * mode for a, mode, _, _ in modes)
    source = sum(a * jnp.pi**2 * (kx**2 + ky**2) * mode for a, mode, kx, ky in modes)

    @jax.jit
    def run(source):
        b = source / cells**2
        return {
            "BiCGStab": wk.bicgstab(laplacian(1), b, tolerance=1e-4, max_iterations=2000),
            "multigrid": wk.multigrid(
                laplacian, b, diagonal_at=lambda level: 4 / level**2, tolerance=1e-4
            ),
        }

    solutions = run(source)
    return solutions, float(jnp.abs(solutions["multigrid"].x - exact).max())


def laplacian(level: int):
    """Minus the five-point Laplacian on cells `level` times as wide, zero on the walls."""

    def update(u):
        around = u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2]
        return (4 * u[1:-1, 1:-1] - around) / level**2

    return functools.partial(
        wk.stencil, update=update, radius=1, boundary=lambda near: -near, corners=False
    )


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
        right.semilogy(residuals / residuals[0], label=f"{name}, {int(s.iterations)}")
    right.set(title="residual", xlabel="iterations", ylabel="norm, of the first")
    right.legend(frameon=False)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
