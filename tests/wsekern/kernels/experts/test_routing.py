"""Rows sent to the wafers of their experts and back, by buckets and by a gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.kernels.experts import routing
from wsekern.wafer.axes import COLS, ROWS, WAFERS

B, T, D, F, E = 8, 8, 6, 5, 8


def make_wafer(backend):
    # Four wafers: with one choice a token, buckets are less than half of a gather.
    return wk.Wafer.virtual(wk.WSE2, 2, 2, 4) if backend == "virtual" else wk.Wafer.devices(2, 2, 4)


def choices(fits):
    """One expert for each token: evenly, so that buckets fit, or the same one for all tokens."""
    spread = jnp.arange(B * T).reshape(B, T, 1) % E
    return spread if fits else spread // 2 * 0 + 1


@pytest.mark.parametrize("backend", ["devices", "virtual"])
@pytest.mark.parametrize("fits", [True, False])
def test_rows_go_by_buckets_if_they_fit_and_come_back_summed(backend, fits):
    def per_pe(x, chosen):
        rows, chosen = x.reshape(-1, x.shape[2]), chosen.reshape(-1, 1)

        def work(route):
            for_this_wafer = route.send(chosen)[:, 0] // (E // 4) == wk.fabric.axis_index(WAFERS)
            results = jnp.where(for_this_wafer[:, None], 2 * route.send(rows), 0)
            gathered = jnp.full_like(rows, float(route is routing._GATHER))
            return route.send_back(results), gathered

        out, gathered = routing.run_routed(chosen, E // 4, work)
        return out.reshape(x.shape), gathered.reshape(x.shape)

    tokens = P(WAFERS, ROWS, COLS)
    x = jax.random.normal(jax.random.key(0), (B, T, D))
    wafer = make_wafer(backend)
    run = wafer.map(per_pe, in_specs=(tokens, P(WAFERS, ROWS, None)), out_specs=(tokens, tokens))
    out, gathered = jax.jit(run)(x, choices(fits))
    np.testing.assert_allclose(out, 2 * x, rtol=1e-6)
    assert (gathered == (not fits)).all()


@pytest.mark.parametrize("backend", ["devices", "virtual"])
@pytest.mark.parametrize("fits", [True, False])
def test_experts_and_gradients_are_the_same_either_way(backend, fits):
    keys = jax.random.split(jax.random.key(1), 5)
    x, shares = (jax.random.normal(k, (B, T, n)) for k, n in zip(keys, (D, 1), strict=False))
    shapes = ((E, D, F), (E, D, F), (E, F, D))
    weights = tuple(jax.random.normal(k, s) for k, s in zip(keys[2:], shapes, strict=True))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def gradients(x, shares, weights, chosen):
        out = wk.experts(x, chosen, shares, weights, activation=jnp.multiply)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    want = gradients(x, shares, weights, choices(fits))
    with make_wafer(backend):
        got = gradients(x, shares, weights, choices(fits))
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_bucket_is_no_more_than_needed():
    assert routing.bucket_rows(1000, 1, 4) == 376  # a quarter on average, and a half more
    assert routing.bucket_rows(1000, 8, 2) > 1000  # nearly every token goes everywhere: a gather
