"""SUMMA broadcasts panels on grids of any sides, and gathers nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

RNG = np.random.default_rng(0)
# Whole numbers, whose products and sums are exact.
A, B, DC = (RNG.integers(-15, 16, s).astype(np.float32) for s in ((4, 16), (16, 3), (4, 3)))


def product(wafer):
    return functools.partial(wk.matmul, algorithm="summa", wafer=wafer)


def gradients(run):
    return jax.jit(lambda a, b, dc: jax.vjp(run, a, b)[1](dc))


@pytest.mark.parametrize(
    "wafer",
    [
        *(wk.Wafer.virtual(wk.WSE2, *grid) for grid in ((3, 2), (3, 5), (5, 2))),
        *(wk.Wafer.devices(*grid) for grid in ((2, 3), (5, 3))),
    ],
    ids=repr,
)
def test_a_panel_may_lie_in_two_tiles(wafer):
    run = product(wafer)
    np.testing.assert_array_equal(jax.jit(run)(A, B), A @ B)
    da, db = gradients(run)(A, B, DC)
    np.testing.assert_array_equal(da, DC @ B.T)
    np.testing.assert_array_equal(db, A.T @ DC)


@pytest.mark.parametrize("leading", [(), (2,)], ids=["matrix", "batch"])
def test_nothing_is_gathered(leading):
    a, b = jnp.ones((*leading, 8, 8)), jnp.ones((8, 8))
    run = product(wk.Wafer.devices(2, 4))
    forward, gradient = jax.jit(run).lower(a, b), gradients(run).lower(a, b, a)
    for program in (forward.as_text(), gradient.as_text()):
        assert "stablehlo.all_reduce" in program
        assert "all_gather" not in program


@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 2), (3, 2)])
def test_steps_are_the_pes_along_the_longer_side(height, width):
    run = product(wk.Wafer.devices(height, width))
    jaxpr = str(jax.make_jaxpr(run)(jnp.ones((12, 12)), jnp.ones((12, 12))))
    assert jaxpr.count("scan[") == 1
    assert f"length={max(height, width) - 1}\n" in jaxpr  # the first product begins the sum
