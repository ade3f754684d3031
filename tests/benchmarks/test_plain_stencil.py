"""The stencils that ours are timed against compute the same."""

import functools

import jax
import numpy as np
import pytest

import wsekern as wk
from benchmarks import plain_stencil


@pytest.mark.parametrize("name", plain_stencil.UPDATES)
def test_all_candidates_take_the_same_steps(name):
    shape = (16, 16, 8) if name == "25-point" else (16, 16)
    u = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    update, radius = plain_stencil.UPDATES[name], plain_stencil.RADII[name]
    go = functools.partial(wk.stencil, update=update, radius=radius, boundary="periodic", steps=2)
    want = jax.jit(functools.partial(plain_stencil.step_by_roll, name=name, steps=2))(u)
    padded = functools.partial(plain_stencil.step_by_pad, name=name, steps=2, unrolled=1)
    ours = functools.partial(go, wafer=wk.Wafer.devices(2, 2))
    for candidate in (ours, padded):
        np.testing.assert_allclose(jax.jit(candidate)(u), want, atol=2e-6)


def test_the_exchange_by_hand_is_the_same():
    wafer = wk.Wafer.devices(2, 4)
    u = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    got = wk.halo_exchange(u, 2, boundary="periodic", wafer=wafer)
    np.testing.assert_array_equal(jax.jit(plain_stencil.exchange_by_hand(wafer, 2))(u), got)
