import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from wsekern.kernels.choose import serving as algorithms

DIVIDES, PADDED = (8, 16, 8), (5, 39, 7)  # M, K, N
OPERANDS = {
    "matrices": ((5, 7), (7, 3)),
    "a row": ((1, 9), (9, 5)),
    "a column": ((6, 9), (9, 1)),
    "an outer product": ((5, 1), (1, 6)),
    "smaller than the grid": ((1, 1), (1, 1)),
    "batched rows, one matrix": ((3, 5, 7), (7, 3)),
    "a matrix each": ((3, 5, 7), (3, 7, 3)),
    "two leading dimensions": ((3, 2, 5, 7), (3, 2, 7, 3)),
    "two leading dimensions, one matrix": ((2, 3, 5, 7), (7, 3)),
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


def product(wafer, algorithm="auto"):
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)


def with_gradients(run):
    """A jitted function of operands and the result's gradient: the result, their gradients."""

    @jax.jit
    def call(a, b, dc):
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    return call


def assert_right(run, a, b, dc, dtype=jnp.float32):
    """The product and both gradients are the plain ones, rounded once, to the bit."""
    got = with_gradients(run)(*(x.astype(dtype) for x in (a, b, dc)))
    for x, want in zip(got, (plain(a, b), *plain_gradients(a, b, dc)), strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, want.astype(np.float32).astype(dtype))


ALL_GRIDS = ["2x4", "2of2x2", "virtual-2x4"]  # no axis of which has one PE only
SQUARES = ["3x3", "2of2x2", "virtual-2of2x2"]
EVERYWHERE = [
    *((algorithm, grid) for algorithm in ("allgather", "summa") for grid in ALL_GRIDS),
    *((algorithm, grid) for algorithm in ("cannon", "mesh") for grid in SQUARES),
]


@pytest.fixture(params=EVERYWHERE, ids=" on ".join)
def everywhere(request, wafer_called):
    algorithm, grid = request.param
    return product(wafer_called(grid), algorithm)


@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_product(wafer, shape):
    M, K, N = shape
    a, b = whole_numbers(M, K), whole_numbers(K, N)
    c = jax.jit(product(wafer))(a, b)
    assert c.dtype == jnp.float32
    np.testing.assert_array_equal(c, plain(a, b))


@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_results_and_gradients_of_any_shape(everywhere, operands):
    a, b = (whole_numbers(*shape) for shape in operands)
    assert_right(everywhere, a, b, whole_numbers(*a.shape[:-1], b.shape[-1]))


@pytest.mark.parametrize("leading", [(), (3,)], ids=["matrix", "batch"])
def test_bfloat16_is_summed_in_float32(everywhere, leading):
    a, b, dc = (
        whole_numbers(*leading, 23, 15),
        whole_numbers(15, 39),
        whole_numbers(*leading, 23, 39),
    )
    assert_right(everywhere, a, b, dc, dtype=jnp.bfloat16)


@pytest.mark.parametrize("leading", [(), (3,)], ids=["matrix", "batch"])
def test_a_tuple_of_right_factors_is_so_many_products(everywhere, leading):
    a = whole_numbers(*leading, 5, 7)
    bs = tuple(whole_numbers(7, N) for N in (3, 8, 1))
    dcs = tuple(whole_numbers(*leading, 5, b.shape[-1]) for b in bs)
    cs, da, dbs = with_gradients(everywhere)(a, bs, dcs)
    assert isinstance(cs, tuple)
    of_each = [plain_gradients(a, b, dc) for b, dc in zip(bs, dcs, strict=True)]
    np.testing.assert_array_equal(da, sum(da for da, _ in of_each))
    for b, c, db, (_, want) in zip(bs, cs, dbs, of_each, strict=True):
        np.testing.assert_array_equal(c, plain(a, b))
        np.testing.assert_array_equal(db, want)


def test_what_a_tuple_shares_is_gathered_once():
    a, b = jnp.ones((4, 8)), jnp.ones((8, 4))
    run = jax.jit(product(wk.Wafer.devices(2, 4), "allgather"))
    one, three = (run.lower(a, bs).as_text() for bs in (b, (b, b, b)))
    assert one.count("stablehlo.all_gather") == three.count("stablehlo.all_gather") == 2


@pytest.mark.parametrize("algorithm", algorithms(wk.Wafer.virtual(wk.WSE2, 2, 2)))
def test_the_gradient_keeps_nothing_but_the_operands(algorithm):
    a, b = jnp.ones((4, 8)), jnp.ones((8, 12))
    run = product(wk.Wafer.virtual(wk.WSE2, 2, 2), algorithm)
    kept = jax.eval_shape(lambda a, b: jax.vjp(run, a, b)[1], a, b)
    assert sorted(x.shape for x in jax.tree.leaves(kept)) == [(4, 8), (8, 12)]


@pytest.mark.parametrize("algorithm", ["summa", "cannon", "mesh"])
def test_temporaries_are_fewer_than_those_of_gathering(algorithm):
    a = b = jax.ShapeDtypeStruct((512, 512), jnp.float32)

    def temporary_bytes(algorithm):
        run = jax.jit(product(wk.Wafer.devices(4, 4), algorithm))
        memory = run.lower(a, b).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(algorithm) < temporary_bytes("allgather")


@pytest.mark.parametrize(
    ("wafer", "size", "move"),
    [
        (wk.Wafer.abstract(wk.WSE2, 4, 4), 16, "all_gather"),
        (wk.Wafer.abstract(wk.WSE2, 4, 4), 512, "ppermute"),
        (wk.Wafer.abstract(wk.WSE2, 2, 4), 16, "all_gather"),
        (wk.Wafer.abstract(wk.WSE2, 2, 4), 512, "psum"),
    ],
)
def test_auto_gathers_while_that_is_little(wafer, size, move):
    a = jax.ShapeDtypeStruct((size, size), jnp.float32)
    program = str(jax.make_jaxpr(with_gradients(product(wafer)))(a, a, a))
    assert move in program
    assert ("all_gather" in program) == (move == "all_gather")


def test_auto_on_emulated_devices_gathers_up_to_8_mib():
    def program(size):
        a = jax.ShapeDtypeStruct((size, size), jnp.float32)
        return jax.jit(product(wk.Wafer.devices(4, 4))).lower(a, a).as_text()

    assert "all_gather" in program(2048)
    assert "all_gather" not in program(2052)


def test_one_pe_runs_the_plain_program():
    def programs(wafer):
        def call(a, b):
            return jnp.matmul(a, b) if wafer is None else wk.matmul(a, b, wafer=wafer)

        return jax.jit(call).lower(jnp.ones((5, 7)), jnp.ones((7, 3))).as_text()

    assert programs(wk.Wafer.devices(1, 1)) == programs(None)


def test_runs_on_the_wafer_in_force():
    a, b = whole_numbers(5, 7), whole_numbers(7, 3)
    run = jax.jit(lambda a, b: wk.matmul(a, b))
    plainly = run(a, b)
    with wk.Wafer.devices(2, 4):
        program = run.lower(a, b).as_text()
        np.testing.assert_array_equal(run(a, b), plainly)
    assert "stablehlo.all_gather" in program


def test_only_square_grids_are_offered_cannon():
    assert algorithms(wk.Wafer.virtual(wk.WSE2, 2, 3)) == ("allgather", "summa")
    assert set(algorithms(wk.Wafer.virtual(wk.WSE2, 3, 3))) == {
        "allgather",
        "summa",
        "cannon",
        "mesh",
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["devices-2x4", "virtual-3x2"])
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(sizes=st.tuples(*[st.integers(1, 9)] * 3))
def test_random_sizes(kind, sizes):
    M, K, N = sizes
    wafer = wk.Wafer.devices(2, 4) if kind == "devices-2x4" else wk.Wafer.virtual(wk.WSE2, 3, 2)
    a, b, dc = whole_numbers(M, K), whole_numbers(K, N), whole_numbers(M, N)
    for algorithm in algorithms(wafer):
        assert_right(product(wafer, algorithm), a, b, dc)


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4, 3), (2, 4), r"a's columns \(3\) must equal b's rows \(2\)"),
        ((4, 3), ((3, 4), (2, 4)), r"a is \(4, 3\) and b is \(2, 4\)"),
        ((3,), (3, 4), "a is .* at least two dimensions"),
        ((4, 3), (3,), "b is .* at least two dimensions"),
        ((4, 3), (2, 3, 4), r"b must be a matrix, or have a's leading dimensions \(\)"),
        ((2, 4, 3), (3, 3, 4), r"b must be a matrix, or have a's leading dimensions \(2,\)"),
        ((4, 3), (), "b is an empty tuple"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wafer, a, b, message):
    of_many = not b or isinstance(b[0], tuple)
    right = tuple(jnp.ones(shape) for shape in b) if of_many else jnp.ones(b)
    with pytest.raises(ValueError, match=f"^matmul: .*{message}"):
        wk.matmul(jnp.ones(a), right, wafer=wafer)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("float32", "bfloat16"), "a is float32 and b is bfloat16: cast one of them first"),
        (("int32", "int32"), "a and b are int32; cast them to a floating dtype"),
    ],
)
def test_refuses_dtypes_that_do_not_fit(dtypes, message):
    a, b = (jnp.ones((4, 4), dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        wk.matmul(a, b, wafer=wk.Wafer.virtual(wk.WSE2, 2, 2))


@pytest.mark.refuses
def test_refuses_an_unknown_algorithm():
    with pytest.raises(ValueError, match="algorithm='strassen' is not one of 'auto', 'allgather'"):
        product(None, "strassen")(jnp.ones((4, 4)), jnp.ones((4, 4)))
