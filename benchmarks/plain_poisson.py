"""Poisson's equation, with a wind, solved by jax.scipy and scipy.sparse: peers for `solvers`.

The domain is a square of cells. The solution is zero on the walls, which are the outer faces of the
outermost cells; so the value beyond a wall is minus the cell's own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.sparse.linalg
import numpy as np
import scipy.sparse
import scipy.sparse.linalg


def solve(b: jax.Array, wind: float, tolerance: float) -> jax.Array:
    """The solution for `b` `[n, n]` by `jax.scipy`: by CG, or with a wind by BiCGStab."""
    method = jax.scipy.sparse.linalg.bicgstab if wind else jax.scipy.sparse.linalg.cg
    return method(operator(b.shape[0], wind), b, tol=tolerance, maxiter=10_000)[0]


def operator(n: int, wind: float) -> Callable[[jax.Array], jax.Array]:
    """Minus the five-point Laplacian of a field `[n, n]` by `jnp.pad`, with a wind along y."""
    first, last = (jnp.arange(n) == place for place in (0, n - 1))
    walls = (first.astype(float) + last)[:, None] + (first.astype(float) + last)[None]
    diagonal = 4 + walls + wind * (first.astype(float) - last)[:, None]

    def apply(u):
        p = jnp.pad(u, 1)
        down, up = p[2:, 1:-1], p[:-2, 1:-1]
        return diagonal * u - (1 - wind) * down - (1 + wind) * up - p[1:-1, 2:] - p[1:-1, :-2]

    return apply


def count_iterations(b: jax.Array, wind: float, tolerance: float) -> int:
    """The iterations that `solve` takes, counted by its calls of the operator."""
    calls: list[int] = []
    apply = operator(b.shape[0], wind)

    def counting(u):
        jax.debug.callback(lambda: calls.append(1))
        return apply(u)

    method = jax.scipy.sparse.linalg.bicgstab if wind else jax.scipy.sparse.linalg.cg
    run = jax.jit(lambda b: method(counting, b, tol=tolerance, maxiter=10_000)[0])
    jax.block_until_ready(run(b))
    jax.effects_barrier()
    return (len(calls) - 1) // (2 if wind else 1)


def by_scipy(b: jax.Array, wind: float, tolerance: float) -> Callable[[], tuple[int, Any]]:
    """A function that solves for `b` by scipy.sparse in float32: the iterations, the solution."""
    a, right = matrix(b.shape[0], wind).astype(np.float32), np.asarray(b).ravel()
    method = scipy.sparse.linalg.bicgstab if wind else scipy.sparse.linalg.cg

    def run():
        calls: list[int] = []
        x, _ = method(a, right, rtol=tolerance, callback=lambda x: calls.append(1))
        return len(calls), x

    return run


def residual(x: Any, b: Any, wind: float) -> float:
    """The norm of `b - A x` over the norm of `b`, in float64."""
    right = np.float64(b).ravel()
    left = right - matrix(b.shape[0], wind) @ np.float64(x).ravel()
    return float(np.linalg.norm(left) / np.linalg.norm(right))


def matrix(n: int, wind: float) -> Any:
    """The operator as a sparse matrix `[n * n, n * n]`."""
    ones, ends = np.ones(n - 1), np.zeros(n)
    ends[[0, -1]] = 1
    line = scipy.sparse.diags([-ones, 2 + ends, -ones], [-1, 0, 1])
    ends[-1] = -1
    windy = scipy.sparse.diags([-ones, ends, ones], [-1, 0, 1])
    eye = scipy.sparse.eye(n)
    return (scipy.sparse.kron(line + wind * windy, eye) + scipy.sparse.kron(eye, line)).tocsr()
