"""`direct` fetches every tile from its owner: moves that wait for none other, and no sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk

RNG = np.random.default_rng(0)
# Whole numbers, whose products and sums are exact.
A, B, DC = (RNG.integers(-15, 16, s).astype(np.float32) for s in ((4, 16), (16, 8), (4, 8)))


def product(wafer, **options):
    return functools.partial(wk.matmul, algorithm="direct", wafer=wafer, **options)


@pytest.mark.parametrize(
    ("options", "moves"),
    [({}, 4), ({"transpose_b": True}, 5), ({"transpose_a": True}, 5)],
    ids=["nn", "nt", "tn"],
)
def test_tiles_move_once_for_each_product_and_sums_do_not(options, moves):
    program = jax.jit(product(wk.Wafer.devices(2, 2), **options))
    text = program.lower(jnp.ones((8, 8)), jnp.ones((8, 8))).as_text()
    assert text.count("stablehlo.collective_permute") == moves
    assert "all_reduce" not in text and "all_gather" not in text and "reduce_scatter" not in text
    assert text.count("stablehlo.dot_general") == 2


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("wafer", "message"),
    [
        (wk.Wafer.devices(2, 4), "needs a square grid, it is 2x4"),
        (wk.Wafer.virtual(wk.WSE2, 2, 2), "is for devices"),
        (wk.Wafer.abstract(wk.WSE2, 2, 2), "is for devices"),
    ],
    ids=repr,
)
def test_refuses(wafer, message):
    with pytest.raises(ValueError, match=message):
        product(wafer)(A, B)


@pytest.mark.parametrize("algorithm", ["direct", "xla"])
def test_on_explicit_axes(algorithm):
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2)
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    a, b, dc = (jax.device_put(x, NamedSharding(mesh, P("a", "b"))) for x in (A, B, DC))

    @jax.jit
    def call(a, b, dc):
        run = functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    with jax.set_mesh(mesh):
        results = call(a, b, dc)
    for got, want in zip(results, (A @ B, DC @ B.T, A.T @ DC), strict=True):
        assert jax.typeof(got).sharding.spec == P("a", "b")
        np.testing.assert_array_equal(got, want)
