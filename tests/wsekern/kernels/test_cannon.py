import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

DIVIDES, PADDED = (8, 16, 8), (5, 39, 7)  # M, K, N
OPERANDS = {
    "matrices": ((5, 7), (7, 3)),
    "smaller than the grid": ((1, 1), (1, 1)),
    "batched rows, one matrix": ((3, 5, 7), (7, 3)),
    "a matrix each": ((3, 2, 5, 7), (3, 2, 7, 3)),
}
both = pytest.mark.parametrize("algorithm", ["cannon", "mesh"])


@pytest.fixture(params=["3x3", "2of2x2", "virtual-2of2x2"])
def square(request):
    """Squares whose every axis has more than one PE, one of an odd side."""
    if request.param == "virtual-2of2x2":
        return wk.Wafer.virtual(wk.WSE2, 2, 2, 2)
    return wk.Wafer.devices(3, 3) if request.param == "3x3" else wk.Wafer.devices(2, 2, 2)


def whole_numbers(*shape):
    """Their products and sums are exact in float32, in whatever order, and not in bfloat16."""
    return np.random.default_rng(shape).integers(-15, 16, shape).astype(np.float32)


def plain(a, b):
    return np.einsum("...mk,...kn->...mn", np.int64(a), np.int64(b))


def plain_gradients(a, b, dc):
    a, b, dc = np.int64(a), np.int64(b), np.int64(dc)
    db = np.einsum("...mk,...mn->...kn", a, dc)
    return np.einsum("...mn,...kn->...mk", dc, b), db.sum(tuple(range(db.ndim - b.ndim)))


def product(wafer, algorithm):
    return functools.partial(wk.matmul, algorithm=algorithm, wafer=wafer)


def with_gradients(run):
    @jax.jit
    def call(a, b, dc):
        c, pullback = jax.vjp(run, a, b)
        return c, *pullback(dc)

    return call


def loops(jaxpr):
    """The bodies of all scans in a jaxpr, and their lengths."""
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                inner = getattr(inner, "jaxpr", inner)
                if equation.primitive.name == "scan":
                    yield inner, equation.params["length"]
                yield from loops(inner)


def is_jaxpr(value):
    return hasattr(value, "eqns")


@both
@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_product(square_wafer, algorithm, shape):
    M, K, N = shape
    a, b = whole_numbers(M, K), whole_numbers(K, N)
    c = jax.jit(product(square_wafer, algorithm))(a, b)
    assert c.dtype == jnp.float32
    np.testing.assert_array_equal(c, plain(a, b))


@both
def test_bfloat16_is_summed_in_float32(square_wafer, algorithm):
    a, b, dc = whole_numbers(39, 39), whole_numbers(39, 37), whole_numbers(39, 37)
    run = with_gradients(product(square_wafer, algorithm))
    got = run(*(x.astype(jnp.bfloat16) for x in (a, b, dc)))
    for x, want in zip(got, (plain(a, b), *plain_gradients(a, b, dc)), strict=True):
        np.testing.assert_array_equal(x, want.astype(np.float32).astype(jnp.bfloat16))


@both
@pytest.mark.parametrize("operands", OPERANDS.values(), ids=OPERANDS)
def test_results_and_gradients_of_any_shape(square, algorithm, operands):
    a, b = (whole_numbers(*shape) for shape in operands)
    dc = whole_numbers(*a.shape[:-1], b.shape[-1])
    c, da, db = with_gradients(product(square, algorithm))(a, b, dc)
    want_da, want_db = plain_gradients(a, b, dc)
    np.testing.assert_array_equal(c, plain(a, b))
    np.testing.assert_array_equal(da, want_da)
    np.testing.assert_array_equal(db, want_db)


@both
def test_a_tuple_of_right_factors_is_so_many_products(algorithm):
    a, bs = whole_numbers(2, 5, 7), (whole_numbers(7, 3), whole_numbers(7, 8))
    dcs = tuple(whole_numbers(2, 5, b.shape[-1]) for b in bs)
    run = with_gradients(product(wk.Wafer.devices(2, 2, 2), algorithm))
    cs, da, dbs = run(a, bs, dcs)
    of_each = [plain_gradients(a, b, dc) for b, dc in zip(bs, dcs, strict=True)]
    np.testing.assert_array_equal(da, sum(da for da, _ in of_each))
    for b, c, db, (_, want) in zip(bs, cs, dbs, of_each, strict=True):
        np.testing.assert_array_equal(c, plain(a, b))
        np.testing.assert_array_equal(db, want)


@both
def test_tiles_only_move(algorithm):
    """Cannon's promise: no operand is gathered and no result reduced, forward or backward."""
    run, a, b = product(wk.Wafer.devices(4, 4), algorithm), jnp.ones((8, 8)), jnp.ones((8, 8))
    forward = jax.jit(run).lower(a, b).as_text()
    gradient = with_gradients(run).lower(a, b, a).as_text()
    for program in (forward, gradient):
        assert "stablehlo.collective_permute" in program
        for other in ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"):
            assert other not in program


@both
def test_tiles_shift_once_less_than_there_are_products(algorithm):
    run = product(wk.Wafer.devices(4, 4), algorithm)
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr
    ((body, length),) = loops(jaxpr)
    assert length == 3
    moves = [e for e in body.eqns if e.primitive.name == "ppermute"]
    assert len(moves) == 2


@pytest.mark.parametrize(("algorithm", "hops"), [("cannon", 3), ("mesh", 2)])
def test_no_shift_of_the_folded_ring_is_longer_than_two_hops(algorithm, hops):
    run = product(wk.Wafer.devices(4, 4), algorithm)
    jaxpr = jax.make_jaxpr(run)(jnp.ones((8, 8)), jnp.ones((8, 8))).jaxpr
    ((body, _),) = loops(jaxpr)
    pairs = [p for e in body.eqns if e.primitive.name == "ppermute" for p in e.params["perm"]]
    assert max(abs(i - j) for i, j in pairs) == hops


@both
def test_temporaries_are_fewer_than_those_of_gathering(algorithm):
    a = b = jax.ShapeDtypeStruct((512, 512), jnp.float32)

    def temporary_bytes(algorithm):
        run = jax.jit(product(wk.Wafer.devices(4, 4), algorithm))
        memory = run.lower(a, b).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(algorithm) < temporary_bytes("allgather")


@pytest.mark.refuses
@both
@pytest.mark.parametrize("K", [8, 2, 1])
def test_refuses_a_grid_that_is_not_square(algorithm, K):
    with pytest.raises(ValueError, match="square"):
        product(wk.Wafer.devices(2, 4), algorithm)(jnp.ones((4, K)), jnp.ones((K, 4)))
