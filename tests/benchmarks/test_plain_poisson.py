"""The solvers that ours are timed against solve the same system."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plain_poisson, solvers


@pytest.mark.parametrize("wind", [0.0, 0.3])
def test_all_candidates_solve_one_system(wind):
    b = jax.random.normal(jax.random.key(0), (16, 16))
    dense = plain_poisson.matrix(16, wind)
    plain = jax.jit(plain_poisson.operator(16, wind))
    np.testing.assert_allclose(plain(b).ravel(), dense @ np.float64(b).ravel(), atol=1e-5)
    theirs = jax.jit(lambda b: plain_poisson.solve(b, wind, 1e-4))(b)
    iterations, by_scipy = plain_poisson.by_scipy(b, wind, 1e-4)()
    solutions = [theirs, by_scipy]
    for solver in solvers._ours(wind, 1e-4).values():
        got = jax.jit(lambda b, s=solver: s(b, wafer=None))(b)
        assert bool(got.converged)
        solutions.append(got.x)
    assert all(plain_poisson.residual(jnp.asarray(x), b, wind) < 1.1e-4 for x in solutions)
    assert abs(plain_poisson.count_iterations(b, wind, 1e-4) - iterations) <= 2
