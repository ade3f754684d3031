"""The example of Poisson's equation, run as a user runs it, and small."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk


@pytest.fixture(scope="module")
def example(example_called):
    return example_called("poisson")


def test_it_is_of_second_order(example):
    solutions, coarse = example.solve(8)
    with wk.Wafer.virtual(wk.WSE2, 2, 2):
        _, fine = example.solve(16)
    assert all(bool(s.converged) for s in solutions.values())
    assert 3.5 < coarse / fine < 4.5
    first, second = (np.asarray(s.x) for s in solutions.values())
    np.testing.assert_allclose(first, second, atol=1e-3)
    assert jnp.isfinite(solutions["multigrid"].x).all()


@pytest.mark.parametrize("where", [["--wafer", "2x2"], ["--virtual", "2x2"]], ids=lambda w: w[0])
def test_it_runs_and_draws(example, run, where, tmp_path, capsys):
    picture = tmp_path / "poisson.png"
    run(example, *where, "--cells", 16, "--out", picture)
    assert capsys.readouterr().out.count("converged") == 2
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_its_default_converges(example):
    solutions, error = example.solve(example.CELLS)
    assert all(bool(solution.converged) for solution in solutions.values())
    assert error < 2e-4


def test_it_says_what_each_solver_would_take_on_a_wafer(example, run, capsys):
    """Multigrid takes a handful of cycles; they and their moves are counted."""
    run(example, "--estimate", "4x4", "--cells", 16)
    parts = re.split(r"(\d+) iterations", capsys.readouterr().out)[1:]
    assert 10 < int(parts[0]) and int(parts[2]) <= 8
    for iterations, said in (parts[:2], parts[2:]):
        moves = re.search(r"in ([\d,]+) moves", said)
        assert moves and "poisson.py" in said
        assert int(moves[1].replace(",", "")) > 10 * int(iterations)
