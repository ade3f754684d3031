"""Kernels on virtual PEs spread over devices give what they give on one device."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk

RNG = np.random.default_rng(0)


def pair(height, width, devices, wafers=1):
    """The same PEs on one device, and spread."""
    alone = wk.Wafer.virtual(wk.WSE2, height, width, wafers)
    return alone, wk.Wafer.virtual(wk.WSE2, height, width, wafers, devices=devices)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def agrees(wafers, function, *operands):
    """A function of a wafer and operands: its results and gradients are the same on both."""

    def everything(wafer):
        run = functools.partial(function, wafer)

        @jax.jit
        def call(*operands):
            out, pull = jax.vjp(run, *operands)
            return out, pull(jax.tree.map(jnp.cos, out))

        return call(*operands)

    want, got = (everything(wafer) for wafer in wafers)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("algorithm", ["cannon", "mesh_gemm", "summa", "allgather"])
def test_a_product_is_the_same(algorithm):
    def product(wafer, a, b):
        return wk.matmul(a, b, algorithm=algorithm, wafer=wafer)

    agrees(pair(4, 4, (2, 2)), product, normal(8, 12), normal(12, 8))


def test_a_product_on_several_wafers_is_the_same():
    def product(wafer, a, b):
        return wk.matmul(a, b, wafer=wafer)

    agrees(pair(2, 4, (2, 1, 2), 2), product, normal(4, 6, 12), normal(12, 7))


def test_a_dimension_along_several_axes_is_one_dimension_of_a_tile():
    def running_sums(wafer, x):
        def per_pe(tile):
            assert tile.shape == (2, 3)
            return {"rows": jnp.cumsum(tile, 0), "sums": tile.sum(0)}

        spec = P(("y", "x"))
        return wafer.map(per_pe, in_specs=spec, out_specs=spec)(x)

    agrees(pair(4, 6, (2, 3)), running_sums, normal(48, 3))


@pytest.mark.parametrize("algorithm", ["ring", "ulysses"])
def test_attention_is_the_same(algorithm):
    def attend(wafer, q, k, v):
        return wk.attention(q, k, v, causal=True, algorithm=algorithm, wafer=wafer)

    agrees(pair(4, 2, (2, 2)), attend, *(normal(2, 16, 8, 4) for _ in range(3)))


def test_embedding_norm_and_loss_are_the_same():
    tokens = jnp.asarray(RNG.integers(0, 16, (2, 8)))

    def loss(wafer, table, scale):
        with wafer:
            h = wk.rms_norm(wk.embedding(tokens, table), scale)
            return wk.cross_entropy(wk.matmul(h, table.T), tokens)

    agrees(pair(4, 4, (2, 2)), loss, normal(16, 8), normal(8))


def heat(u):
    around = u[1:-1, :-2] + u[1:-1, 2:] + u[:-2, 1:-1] + u[2:, 1:-1]
    return 0.3 * u[1:-1, 1:-1] + 0.15 * around


@pytest.mark.parametrize(
    ("boundary", "radius", "width"), [("periodic", 2, 18), ("reflect", 1, 17), (2.0, 1, 17)]
)
def test_a_stencil_is_the_same(boundary, radius, width):
    """With its gradient by checkpoints; a field that does not divide is padded as ever."""

    def steps(wafer, u):
        update = heat if radius == 1 else lambda u: heat(heat(u))
        options: dict[str, Any] = dict(boundary=boundary, steps=5, checkpoint="sqrt")
        return wk.stencil(u, update, radius=radius, wafer=wafer, **options)

    agrees(pair(4, 6, (2, 2)), steps, normal(8, width))


def test_a_solver_takes_the_same_steps():
    b = normal(16, 16)

    def laplacian(u):
        around = u[1:-1, :-2] + u[1:-1, 2:] + u[:-2, 1:-1] + u[2:, 1:-1]
        return 4 * u[1:-1, 1:-1] - around

    def solve(wafer):
        operator = functools.partial(
            wk.stencil, update=laplacian, radius=1, boundary="zero", corners=False, wafer=wafer
        )
        return jax.jit(lambda b: wk.cg(operator, b))(b)

    one, many = (solve(wafer) for wafer in pair(4, 4, (2, 2)))
    assert bool(many.converged) and int(one.iterations) == int(many.iterations)
    np.testing.assert_allclose(one.x, many.x, rtol=1e-3, atol=1e-4)


def test_arrays_lie_in_blocks_and_stay_there():
    _, wafer = pair(4, 8, (2, 4))
    u = wafer.shard(normal(8, 16))
    assert u.sharding.shard_shape(u.shape) == (4, 4)
    product = jax.jit(lambda a: wk.matmul(a, a.T, wafer=wafer))(u)
    assert product.sharding.device_set == set(wafer.device_mesh.devices.flat)
    np.testing.assert_allclose(product, u @ u.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(wafer.tile(u, 3, 5), u[6:8, 10:12])
    with wafer:
        v = wk.stencil(u, heat, radius=1)
    assert v.sharding.is_equivalent_to(wafer.sharding(P("y", "x")), 2)


def test_an_operand_elsewhere_is_refused():
    _, wafer = pair(4, 4, (2, 2))
    u = jax.device_put(np.ones((8, 8), np.float32), jax.devices()[0])
    with pytest.raises(ValueError, match="which are not the wafer's 4; move it with wafer.shard"):
        wafer.map(lambda u: u, in_specs=P("y"), out_specs=P("y"))(u)


def test_a_wafer_of_devices_says_which():
    devices = jax.devices()[4:8]
    grid = wk.Wafer.devices(2, 2, devices=devices)
    wafer = wk.Wafer.virtual(wk.WSE2, 4, 6, devices=grid)
    assert list(wafer.device_mesh.devices.flat) == devices and wafer.platform == "cpu"
    assert wafer.devices_along("y") == 2 and wafer.devices_along("wafer") == 1
    assert repr(wafer).endswith("on 4 devices>")
    assert wafer == wk.Wafer.virtual(wk.WSE2, 4, 6, devices=grid)
    mesh = jax.make_mesh((2, 3), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2,
                         devices=jax.devices()[:6])  # fmt: skip
    turned = wk.Wafer.virtual(wk.WSE2, 3, 2, devices=wk.Wafer.of(mesh, y="b", x="a"))
    np.testing.assert_array_equal(turned.device_mesh.devices, mesh.devices.T)


def test_a_region_is_of_whole_blocks():
    _, wafer = pair(8, 8, (4, 2))
    part = wafer.region(2, 4, 4, 4)
    np.testing.assert_array_equal(part.device_mesh.devices, wafer.device_mesh.devices[1:3, 1:])
    u = normal(8, 8)
    got = wk.matmul(u, u, algorithm="cannon", wafer=part)
    np.testing.assert_allclose(got, u @ u, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="3 PEs from 2 on along 'y' are no whole blocks of the 2"):
        wafer.region(2, 4, 3, 4)


def test_the_estimator_sees_the_wafer_and_not_the_devices():
    a = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    one, many = (wk.estimate(jnp.matmul, a, a, wafer=wafer) for wafer in pair(4, 4, (2, 2)))
    assert one.cycles == many.cycles


REFUSALS: dict[str, tuple[Any, str]] = {
    "rows": ((4, 2), "height=6 does not divide by the 4 devices along 'y'; take 4 or 8"),
    "columns": ((1, 8), "width=4 does not divide by the 8 devices along 'x'; take 8, or other"),
    "wafers": ((2, 1, 1), "wafers=1 does not divide by the 2 devices along 'wafer'"),
    "too many": ((6, 4), "6x4 needs 24 devices, there are 16"),
    "a number": (4, r"devices=4 must be \(rows, columns\) or \(wafers, rows, columns\)"),
    "virtual": (wk.Wafer.virtual(wk.WSE2, 2, 2), "is no wafer of devices"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name):
    devices, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        wk.Wafer.virtual(wk.WSE2, 6, 4, devices=devices)


def test_its_mesh_is_adopted_by_no_other_wafer():
    _, wafer = pair(4, 4, (2, 2))
    with pytest.raises(ValueError, match="over which Wafer.virtual spreads PEs"):
        wk.Wafer.of(wafer.device_mesh, y="y_devices", x="x_devices")
    assert wk.stencil(wafer.shard(normal(8, 8)), heat, radius=1).shape == (8, 8)
    assert dataclasses.replace(wafer, mesh=None) == pair(4, 4, (2, 2))[0]
