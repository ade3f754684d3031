"""The shallow sea: equal to whole arrays, keeps its mass, draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from benchmarks import plain_sea

CELLS = 12, 16


@pytest.fixture(scope="module")
def sea(example_called):
    return example_called("shallow_water")


def bumpy():
    y, x = np.ogrid[:12, :16]
    return 80 + 15 * np.sin(y / 3.1) * np.cos(x * np.pi / 4)


def sail(sea, state, land, steps):
    return jax.jit(functools.partial(sea.sail, steps=steps))(state, land)


def test_it_is_the_scheme_on_whole_arrays(sea, full_wafer):
    """After 100 steps of a jet, over ground that is not flat."""
    state, land = sea.jet(*CELLS), sea.walls(*CELLS, bumpy())

    @jax.jit
    def plain(state):
        step = lambda i, s: plain_sea.step(s, land, sea, i == 0)  # noqa: E731
        return jax.lax.fori_loop(0, 100, step, state)

    want = plain(state)
    with full_wafer:
        got = sail(sea, state, land, 100)
    for name, value in want.items():
        assert abs(value).max() > 0
        np.testing.assert_allclose(got[name], value, atol=1e-4 * abs(value).max(), err_msg=name)


def test_a_lake_at_rest_stays_at_rest_to_the_bit(sea, full_wafer):
    state = jax.tree.map(jnp.zeros_like, sea.jet(*CELLS)) | {"eta": jnp.full(CELLS, 0.37)}
    with full_wafer:
        after = sail(sea, state, sea.walls(*CELLS, bumpy()), 50)
    for name, value in state.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-7), ("float64", 1e-12)])
def test_no_water_is_lost_in_ten_thousand_steps(sea, dtype, most):
    with jax.enable_x64(dtype == "float64"):
        as_dtype = functools.partial(jax.tree.map, lambda a: a.astype(dtype))
        state, land = as_dtype(sea.jet(*CELLS)), as_dtype(sea.walls(*CELLS))
        with wk.Wafer.virtual(wk.WSE3, 2, 2):
            after = sail(sea, state, land, 10_000)
        assert after["eta"].dtype == dtype and abs(after["eta"] - state["eta"]).max() > 1e-2
        mass = [
            sea.DEPTH * 192 + np.asarray(s["eta"]).sum(dtype=np.float64) for s in (state, after)
        ]
    assert abs(mass[1] / mass[0] - 1) < most


def test_no_shared_expression_is_computed_again_at_each_use(sea, as_shipped):
    """XLA alone computes 377 operations a cell and step; with `wk.stencil`, 222."""
    state, land = sea.jet(180, 360), sea.walls(180, 360)
    go = functools.partial(sea.sail, land=land, steps=200)
    costs = jax.jit(go).lower(state).compile(compiler_options=as_shipped).cost_analysis()
    assert costs is not None and costs["flops"] < 270 * 180 * 360


def test_it_draws_an_animation(sea, run, tmp_path, capsys):
    film = tmp_path / "sea.gif"
    size = ["--height", 24, "--length", 32, "--days", 1, "--frames", 3]
    run(sea, "--wafer", "2x2", *size, "--out", film)
    assert "mass changed by" in capsys.readouterr().out and film.stat().st_size > 5_000
    run(sea, "--estimate", "4x4", *size)
    assert "cycles" in capsys.readouterr().out
