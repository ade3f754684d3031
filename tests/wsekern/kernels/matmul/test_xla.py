"""`xla` leaves the split of whole arrays to XLA: the program that a plain product would be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import wsekern as wk

RNG = np.random.default_rng(0)
A, B = (RNG.integers(-15, 16, shape).astype(np.float32) for shape in ((4, 8, 16), (16, 8)))


def product(wafer, **options):
    return functools.partial(wk.matmul, algorithm="xla", wafer=wafer, **options)


def test_is_the_program_of_a_plain_product():
    wafer = wk.Wafer.devices(2, 4)

    def plainly(a, b):
        lay_out = functools.partial(
            jax.lax.with_sharding_constraint, shardings=wafer.sharding(P("y", "x"))
        )
        return lay_out(lay_out(a) @ lay_out(b))

    def collectives(run):
        text = jax.jit(run).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text() or ""
        names = ("all-gather(", "all-reduce(", "collective-permute(", "reduce-scatter(")
        return [text.count(name) for name in names], text.count(" dot(")

    assert collectives(product(wafer)) == collectives(plainly)


def test_other_axes_of_the_mesh_go_on_splitting_a_batch():
    mesh = jax.make_mesh((4, 2, 2), ("data", "a", "b"), (AxisType.Auto,) * 3)
    run = jax.jit(product(wk.Wafer.of(mesh, y="a", x="b")))
    a = jax.device_put(A, NamedSharding(mesh, P("data", "a", "b")))
    c = run(a, jax.device_put(B, NamedSharding(mesh, P("a", "b"))))
    np.testing.assert_array_equal(c, A @ B)
    assert c.sharding.spec == P("data", "a", "b")


def test_several_right_factors_with_epilogue_and_gradients(wafer_called):
    weights = jnp.asarray(RNG.integers(-9, 9, (16, 8)), jnp.int8)
    scales, bias = jnp.asarray(RNG.random(8), jnp.float32), jnp.ones(8)

    def loss(wafer, a, scales, bias):
        cs = wk.matmul(
            a, (weights, weights), scales=(scales, scales), bias=(bias, None), activation="silu",
            algorithm="auto" if wafer is None else "xla", wafer=wafer,
        )  # fmt: skip
        return sum(jnp.sum(c * c) for c in cs)

    run = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)
    for got, want in zip(
        run(wafer_called("2x4"), A[0], scales, bias), run(None, A[0], scales, bias), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-2)


@pytest.mark.refuses
def test_virtual_pes_are_refused():
    with pytest.raises(ValueError, match="XLA does not split virtual PEs"):
        product(wk.Wafer.virtual(wk.WSE2, 2, 2))(A, B)
