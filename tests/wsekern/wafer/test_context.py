"""`with wafer:` chooses the wafer of jitted functions, gradients and threads."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern import fabric
from wsekern.wafer import context

A: Any = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
B: Any = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)


def grid():
    """An array as large as the grid in force, as its kernel sees it; of integers on devices."""
    wafer = context.current()
    if wafer is None:
        return jnp.zeros((), bool)

    def kernel():
        on_devices = bool(jax.sharding.get_abstract_mesh().manual_axes)
        sides = fabric.axis_size("y"), fabric.axis_size("x")
        return jnp.zeros(sides, jnp.int32 if on_devices else jnp.float32)

    return wafer.map(kernel, in_specs=(), out_specs=P())()


def shape_and_dtype(array):
    return array.shape, array.dtype.name


def test_one_jitted_function_takes_the_wafer_in_force():
    traces = []

    @jax.jit
    def product(a, b):
        traces.append(context.current())
        return wk.matmul(a, b), grid()

    wafers = {
        ((2, 4), "int32"): wk.Wafer.devices(2, 4),
        ((4, 2), "int32"): wk.Wafer.devices(4, 2),
        ((2, 4), "float32"): wk.Wafer.virtual(wk.WSE2, 2, 4),
    }
    for _ in range(2):
        for where, wafer in wafers.items():
            with wafer:
                c, at = product(A, B)
            np.testing.assert_allclose(c, A @ B, atol=1e-5)
            assert shape_and_dtype(at) == where
        assert shape_and_dtype(product(A, B)[1]) == ((), "bool")
        with wk.Wafer.abstract(wk.WSE2, 50, 70):
            c, at = jax.eval_shape(product, A, B)
        assert (c.shape, shape_and_dtype(at)) == ((7, 6), ((50, 70), "int32"))
    assert len(traces) == 5, "a second call on the same wafer needs no second trace"


def test_a_jaxpr_is_that_of_the_wafer_in_force():
    trace = jax.make_jaxpr(jax.jit(wk.matmul))
    plain = str(trace(A, B))
    with wk.Wafer.abstract(wk.WSE3):
        assert "'y': 755, 'x': 1170" in str(trace(A, B))
    with wk.Wafer.virtual(wk.WSE3, 2, 2):
        assert "shard_map" not in str(trace(A, B)) != plain
    with wk.Wafer.devices(1, 1):
        assert str(trace(A, B)) == plain
    assert str(trace(A, B)) == plain


def test_the_innermost_wafer_holds_until_its_block_ends():
    outer, inner = wk.Wafer.devices(2, 2), wk.Wafer.virtual(wk.WSE2, 3, 3)
    assert context.current() is None
    with outer as entered:
        assert entered is outer and context.current() == outer
        with inner, outer, inner:
            assert context.current() == inner
        assert context.current() == outer
    assert context.current() is None


def test_an_exception_restores_the_wafer():
    outer = wk.Wafer.devices(2, 2)
    with outer:
        with pytest.raises(ZeroDivisionError), wk.Wafer.devices(1, 2):
            raise ZeroDivisionError
        assert context.current() == outer
    assert context.current() is None


def test_the_wafer_given_goes_before_the_one_entered():
    entered, argument = wk.Wafer.devices(2, 2), wk.Wafer.virtual(wk.WSE2, 2, 2)
    one = wk.Wafer.devices(1, 1)
    assert context.resolve(None) is None
    assert context.resolve(argument) == argument
    with entered:
        assert context.resolve(None) == entered
        assert context.resolve(argument) == argument
        assert context.resolve(one) is None, "on one PE the plain operation is the program"


@pytest.mark.parametrize("backend", ["devices", "virtual"])
def test_a_pullback_outlives_the_block(backend):
    wafer = wk.Wafer.devices(2, 4) if backend == "devices" else wk.Wafer.virtual(wk.WSE2, 2, 4)
    with wafer:
        c, pull = jax.vjp(jax.jit(wk.matmul), A, B)
    got = jax.jit(pull)(jnp.cos(c))
    want = np.cos(A @ B) @ B.T, A.T @ np.cos(A @ B)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got, want)
    assert ("shard_map" in str(jax.make_jaxpr(pull)(c))) == (backend == "devices")


def in_thread(work):
    """What `work` returns in a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(60)
    (result,) = results
    return result


def test_a_new_thread_sees_no_wafer_but_takes_the_one_given():
    product = jax.jit(wk.matmul, static_argnames="wafer")
    with wk.Wafer.devices(2, 4) as wafer:
        assert in_thread(context.current) is None
        c = in_thread(lambda: product(A, B, wafer=wafer))
        assert context.current() == wafer
    assert len(c.sharding.device_set) == 8
    np.testing.assert_allclose(c, A @ B, atol=1e-5)


def test_threads_enter_wafers_of_their_own():
    both_entered, own_wafer_seen = threading.Barrier(2, timeout=60), {}

    def work(side):
        with wk.Wafer.virtual(wk.WSE2, side, side) as mine:
            both_entered.wait()
            own_wafer_seen[side] = context.current() == mine

    with wk.Wafer.virtual(wk.WSE2, 7, 7) as wafer:
        threads = [threading.Thread(target=work, args=(side,)) for side in (3, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert context.current() == wafer
    assert own_wafer_seen == {3: True, 5: True}


def test_scan_and_checkpoint_are_traced_for_the_wafer_in_force():
    """Their traces are kept by jax too, and would be reused on another grid under a global."""

    @jax.checkpoint
    def layer(h, _):
        return jnp.tanh(wk.matmul(h, B)), grid()

    def network(h):
        h, grids = lax.scan(layer, h, length=2)
        return (h**2).sum(), grids[0]

    def plain(h):
        return (jnp.tanh(jnp.tanh(h @ B) @ B) ** 2).sum()

    trained = jax.jit(jax.grad(network, has_aux=True))
    want = jax.jit(jax.grad(plain))(A)
    for height, width in [(2, 4), (4, 2), (2, 4)]:
        with wk.Wafer.devices(height, width):
            gradient, at = trained(A)
        np.testing.assert_allclose(gradient, want, atol=1e-5)
        assert at.shape == (height, width)


@pytest.mark.parametrize("backend", ["devices", "virtual"])
def test_a_kernel_has_no_current_wafer_but_is_inside_its_own(backend):
    wafer = wk.Wafer.devices(2, 4) if backend == "devices" else wk.Wafer.virtual(wk.WSE2, 2, 4)
    wafers = []

    def kernel(u):
        wafers.append((context.current(), context.inside()))
        return wk.matmul(u, u)

    tiles = np.arange(32, dtype=np.float32).reshape(4, 8)
    with wafer:
        squares = wafer.map(kernel, in_specs=P("y", "x"), out_specs=P("y", "x"))(tiles)
        assert context.inside() is None
    assert set(wafers) == {(None, wafer)}
    first = tiles[:2, :2]
    np.testing.assert_allclose(squares[:2, :2], first @ first)
