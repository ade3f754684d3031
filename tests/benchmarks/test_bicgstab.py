"""The whole-wafer solve on small wafers equals the solve on one array."""

import functools

import jax
import numpy as np
import pytest

import wsekern as wk
from benchmarks import bicgstab


@pytest.fixture(scope="module")
def problem_and_solution():
    matrix, b = bicgstab.problem((4, 8, 5))
    return matrix, b, bicgstab.plain(matrix, b)


@pytest.mark.parametrize("backend", ["columns", "tiles", "devices", "defects"])
def test_it_is_solved_as_on_one_array(problem_and_solution, backend):
    matrix, b, (want, *_) = problem_and_solution
    wafer = {
        "columns": wk.Wafer.virtual(wk.WSE1, 4, 8),
        "tiles": wk.Wafer.virtual(wk.WSE1, 2, 2),
        "devices": wk.Wafer.devices(2, 4),
        "defects": wk.Wafer.virtual(wk.WSE1, 4, 8, defects=wk.Defects.random(wk.WSE1, 0.99)),
    }[backend]
    x, iterations, residual = bicgstab.solve(matrix, b, wafer)
    assert residual <= 1e-6 and 5 < iterations < 40
    np.testing.assert_allclose(x, want, atol=2e-5 * np.abs(want).max())


def test_a_pe_sends_its_column_four_times_a_product():
    """Two products an iteration, beside three sums."""
    wafer = wk.Wafer.abstract(wk.WSE1, 60, 59)
    field = jax.ShapeDtypeStruct((60, 59, 16), np.float32)
    run = functools.partial(bicgstab.solve, wafer=wafer)
    e = [wk.estimate(run, (field,) * 6, field, wafer=wafer, trips=t) for t in (1, 2)]
    sums = e[1].moves - e[0].moves - 2 * 4
    assert sums == 3
    assert e[1].sram_per_pe < 2 * 16 * 4 * (6 + 8)


def test_the_published_iteration_is_told_beside_the_estimate():
    assert "published 28.1 us, estimated" in bicgstab.published_time()
