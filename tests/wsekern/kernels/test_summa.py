import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

DIVIDES, PADDED = (8, 16, 8), (5, 39, 7)  # M, K, N
OPERANDS = {
    "matrices": ((5, 7), (7, 3)),
    "a row": ((1, 11), (11, 5)),
    "smaller than the grid": ((1, 1), (1, 1)),
    "batched rows, one matrix": ((3, 5, 7), (7, 3)),
    "a matrix each": ((3, 2, 5, 7), (3, 2, 7, 3)),
}


def whole_numbers(*shape):
    """Their products and sums are exact in float32, in whatever order, and not in bfloat16."""
    return np.random.default_rng(shape).integers(-15, 16, shape).astype(np.float32)


def plain(a, b):
    return np.einsum("...mk,...kn->...mn", np.int64(a), np.int64(b))


def plain_gradients(a, b, dc):
    a, b, dc = np.int64(a), np.int64(b), np.int64(dc)
    db = np.einsum("...mk,...mn->...kn", a, dc)
    return np.einsum("...mn,...kn->...mk", dc, b), db.sum(tuple(range(db.ndim - b.ndim)))


def product(wafer, algorithm="summa"):
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)


def with_gradients(run):
    @jax.jit
    def call(a, b, dc):
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    return call


def assert_right(wafer, a, b):
    """The product and both gradients are the plain ones."""
    dc = whole_numbers(*a.shape[:-1], b.shape[-1])
    got = with_gradients(product(wafer))(a, b, dc)
    for x, want in zip(got, (plain(a, b), *plain_gradients(a, b, dc)), strict=True):
        np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_product(wafer, shape):
    M, K, N = shape
    a, b = whole_numbers(M, K), whole_numbers(K, N)
    c = jax.jit(product(wafer))(a, b)
    assert c.dtype == jnp.float32
    np.testing.assert_array_equal(c, plain(a, b))


def test_bfloat16_is_summed_in_float32(full_wafer):
    a, b, dc = whole_numbers(39, 39), whole_numbers(39, 37), whole_numbers(39, 37)
    run = with_gradients(product(full_wafer))
    got = run(*(x.astype(jnp.bfloat16) for x in (a, b, dc)))
    for x, want in zip(got, (plain(a, b), *plain_gradients(a, b, dc)), strict=True):
        np.testing.assert_array_equal(x, want.astype(np.float32).astype(jnp.bfloat16))


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_results_and_gradients_of_any_shape(full_wafer, operands):
    assert_right(full_wafer, *(whole_numbers(*shape) for shape in operands))


@pytest.mark.parametrize("grid", [(3, 2), (3, 5), (5, 2)])
def test_a_panel_may_lie_in_two_tiles(grid):
    assert_right(wk.Wafer.virtual(wk.WSE2, *grid), whole_numbers(4, 16), whole_numbers(16, 3))


@pytest.mark.parametrize("grid", [(2, 3), (5, 3)])
def test_a_panel_may_lie_in_two_tiles_of_devices(grid):
    assert_right(wk.Wafer.devices(*grid), whole_numbers(4, 16), whole_numbers(16, 3))


def test_a_tuple_of_right_factors_is_so_many_products():
    a, bs = whole_numbers(2, 5, 7), (whole_numbers(7, 3), whole_numbers(7, 8))
    dcs = tuple(whole_numbers(2, 5, b.shape[-1]) for b in bs)
    cs, da, dbs = with_gradients(product(wk.Wafer.devices(2, 2, 2)))(a, bs, dcs)
    of_each = [plain_gradients(a, b, dc) for b, dc in zip(bs, dcs, strict=True)]
    np.testing.assert_array_equal(da, sum(da for da, _ in of_each))
    for b, c, db, (_, want) in zip(bs, cs, dbs, of_each, strict=True):
        np.testing.assert_array_equal(c, plain(a, b))
        np.testing.assert_array_equal(db, want)


@pytest.mark.parametrize("leading", [(), (2,)], ids=["matrix", "batch"])
def test_nothing_is_gathered(leading):
    a, b = jnp.ones((*leading, 8, 8)), jnp.ones((8, 8))
    run = product(wk.Wafer.devices(2, 4))
    forward, gradient = jax.jit(run).lower(a, b), with_gradients(run).lower(a, b, a)
    for program in (forward.as_text(), gradient.as_text()):
        assert "stablehlo.all_reduce" in program
        assert "all_gather" not in program


@pytest.mark.parametrize(("height", "width"), [(2, 4), (4, 2), (3, 2)])
def test_there_are_as_many_steps_as_pes_along_the_longer_side(height, width):
    run = product(wk.Wafer.devices(height, width))
    jaxpr = str(jax.make_jaxpr(run)(jnp.ones((12, 12)), jnp.ones((12, 12))))
    assert jaxpr.count("scan[") == 1
    assert f"length={max(height, width)}\n" in jaxpr


def test_temporaries_are_fewer_than_those_of_gathering():
    a = b = jax.ShapeDtypeStruct((512, 512), jnp.float32)

    def temporary_bytes(algorithm):
        run = jax.jit(product(wk.Wafer.devices(4, 4), algorithm))
        memory = run.lower(a, b).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes("summa") < temporary_bytes("allgather")
