"""The programs that GPUs and TPUs run, here on CPU devices: results, messages, buffers."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from tests.wsekern.kernels.stencil.test_stencil import field, run, star, weighted

STENCIL = importlib.import_module("wsekern.kernels.stencil.stencil")
PLAN = importlib.import_module("wsekern.kernels.stencil.plan")
# Every way to get a halo: fused with the update, in padded buffers, and with the inside apart.
WAYS: dict[str, dict] = {
    "joined": {"depth": 1},
    "padded": {"depth": 2},
    "overlap": {"depth": 1, "overlap": True},
    "by itself": {},
}


@pytest.fixture
def on_gpu(monkeypatch):
    """Has stencils take their devices for GPUs from now on."""

    def become():
        monkeypatch.setattr(STENCIL, "_platform", lambda wafer: "gpu")

    return become


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("boundary", "shape"),
    [(["fixed", "reflect"], (31, 30)), ("periodic", (32, 32)), (lambda near: -near, (31, 30))],
    ids=["fixed and reflect", "periodic", "a function"],
)
def test_results_are_those_of_cpus(way, boundary, shape, on_gpu, wafer_called):
    options = {"steps": 5, "boundary": boundary}
    want = run(field(shape), **options)
    on_gpu()
    for wafer in (None, wafer_called("2x4")):
        got = run(field(shape), wafer=wafer, **options, **WAYS[way])
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
def test_gradients_are_those_of_cpus(checkpoint, on_gpu, wafer_called):
    def loss(u, wafer, **options):
        out = wk.stencil(u, weighted, radius=1, steps=4, wafer=wafer, **options)
        return jnp.sum(jnp.sin(out))

    u = field((16, 24))
    want = jax.jit(jax.grad(functools.partial(loss, wafer=None)))(u)
    on_gpu()
    for depth in (None, 1):
        options = {"wafer": wafer_called("2x4"), "checkpoint": checkpoint, "depth": depth}
        got = jax.jit(jax.grad(functools.partial(loss, **options)))(u)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def messages_in_a_row(jaxpr):
    """The most exchanges of which each waits for the one before, in any one jaxpr."""
    longest = 0
    before: dict = {}
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        nested = [messages_in_a_row(j) for j in inner if hasattr(j, "eqns")]
        steps = max([before.get(v, 0) for v in equation.invars if not hasattr(v, "val")] or [0])
        steps += equation.primitive.name == "ppermute"
        before |= dict.fromkeys(equation.outvars, steps)
        longest = max(longest, steps, *nested, 0)
    return longest


# What is read diagonally across, as all deep halos are, comes in two steps.
@pytest.mark.parametrize(
    ("update", "depth", "in_a_row"), [(star, 1, 1), (weighted, 1, 2), (star, 2, 2)]
)
def test_messages_along_one_dimension_travel_together(
    update, depth, in_a_row, on_gpu, wafer_called
):
    go = functools.partial(wk.stencil, update=update, radius=1, steps=depth, depth=depth)
    u = jax.ShapeDtypeStruct((32, 32), np.float32)
    on_gpu()
    jaxpr = jax.make_jaxpr(functools.partial(go, wafer=wafer_called("2x4")))(u)
    assert messages_in_a_row(jaxpr.jaxpr) == in_a_row


def test_large_tiles_need_no_padded_buffer(on_gpu, wafer_called, monkeypatch):
    def program(wafer):
        go = functools.partial(wk.stencil, update=weighted, radius=1, steps=6, wafer=wafer)
        return jax.jit(go).lower(jax.ShapeDtypeStruct((32, 32), np.float32)).as_text()

    on_gpu()
    assert "dynamic_update_slice" in program(wafer_called("2x4"))  # deep halos
    assert "dynamic_update_slice" not in program(None)  # nothing is sent
    monkeypatch.setattr(PLAN, "_LARGE_TILE", 16 * 8 * 4)  # bytes of a tile
    assert "dynamic_update_slice" not in program(wafer_called("2x4"))
