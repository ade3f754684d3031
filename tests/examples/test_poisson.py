"""The example of Poisson's equation, run as a user runs it but in this process, and small."""

import importlib.util
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

PATH = pathlib.Path(__file__).parents[2] / "examples" / "poisson.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("poisson_example", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_of_second_order_and_draws(example, tmp_path):
    solutions, coarse = example.solve(8)
    with wk.Wafer.virtual(wk.WSE2, 2, 2):
        _, fine = example.solve(16)
    assert all(bool(s.converged) for s in solutions.values())
    assert 3.5 < coarse / fine < 4.5
    first, second = (np.asarray(s.x) for s in solutions.values())
    np.testing.assert_allclose(first, second, atol=1e-3)
    example.draw(solutions, str(tmp_path / "poisson.png"))
    assert (tmp_path / "poisson.png").stat().st_size > 10_000
    assert jnp.isfinite(solutions["multigrid"].x).all()
