"""Contractions of whole arrays outside kernels: each is priced as a program that could run it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import wsekern as wk


def array(*shape, dtype=jnp.float16):
    return jax.ShapeDtypeStruct(shape, dtype)


def estimate(function, *operands, grid=(90, 90), **options):
    return wk.estimate(function, *operands, wafer=wk.Wafer.abstract(wk.WSE3, *grid), **options)


SIDE = 720
A = array(SIDE, SIDE)


@pytest.fixture(scope="module")
def ours():
    return estimate(wk.matmul, A, A)


@pytest.mark.parametrize(
    "product",
    [
        lambda a, b: a @ b,
        lambda a, b: a @ b.T,
        lambda a, b: a.T @ b,
        lambda a, b: jnp.einsum("ij,jk->ki", a, b),
        lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32),
        jax.jit(lambda a, b: a @ b),
        jax.checkpoint(lambda a, b: a @ b),
        lambda a, b: lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: b),
    ],
    ids=["plain", "nt", "tn", "einsum", "dot", "jit", "remat", "cond"],
)
def test_a_product_costs_what_ours_costs(product, ours):
    e = estimate(product, A, A)
    assert 0.9 * ours.cycles < e.cycles < 1.5 * ours.cycles
    assert e.flops == pytest.approx(2 * SIDE**3, rel=0.01)
    assert max(e.words.values()) > 0.5 * max(ours.words.values())
    assert e.sram_per_pe > 0.5 * ours.sram_per_pe
    assert list(e.assumed) == ["dot_general as wk.matmul"]
    assert "assumed          dot_general as wk.matmul (test_contractions.py:" in str(e)


def test_a_loop_and_a_gradient_cost_their_products(ours):
    step = lambda c, b: (c @ b).astype(c.dtype)  # noqa: E731
    scan = estimate(lambda a, b: lax.scan(lambda c, _: (step(c, b), None), a, length=10)[0], A, A)
    assert scan.cycles == pytest.approx(10 * ours.cycles, rel=0.1)
    loop = estimate(
        lambda a, b: lax.while_loop(lambda c: c[0, 0] < 1, lambda c: step(c, b), a), A, A, trips=10
    )
    assert loop.cycles > 9 * ours.cycles
    grad = estimate(jax.grad(lambda a, b: (a @ b).astype(jnp.float32).sum(), (0, 1)), A, A)
    assert grad.flops == pytest.approx(2 * 2 * SIDE**3, rel=0.05)
    assert 1.5 * ours.cycles < grad.cycles < 4 * ours.cycles


@pytest.mark.parametrize(
    ("product", "shapes"),
    [
        (lambda a, v: a @ v, [(SIDE, SIDE), (SIDE,)]),
        (lambda v, a: v @ a, [(SIDE,), (SIDE, SIDE)]),
        (lambda v, a: jnp.vecdot(v, a), [(9000,), (9000,)]),
    ],
    ids=["matrix x vector", "vector x matrix", "two vectors"],
)
def test_a_vector_is_summed_over_the_wafer(product, shapes):
    e = estimate(product, *(array(*shape) for shape in shapes))
    assert any(name.startswith("reduce by") for name, _, _ in e.by_operation)
    ours = estimate(wk.gemv, array(SIDE), A)
    assert 0.5 * ours.cycles < e.cycles < 2 * ours.cycles


def test_the_elements_of_a_batch_have_regions_of_their_own():
    """81 products on 81 regions of 11 x 11 PEs take as long as one product on one region."""
    one = estimate(wk.matmul, array(44, 44), array(44, 44), grid=(11, 11))
    stack = array(64, 44, 44)
    for product in (jax.vmap(jnp.matmul), functools.partial(jnp.einsum, "bij,bjk->bik")):
        e = estimate(product, stack, stack)
        assert e.cycles == pytest.approx(one.cycles, rel=0.2)
        assert e.flops == pytest.approx(64 * 2 * 44**3, rel=0.01)
    few = array(2, 720, 720)  # of 90 x 90 PEs, both products have all, one after the other
    assert estimate(jnp.matmul, few, few).cycles < 2.1 * estimate(wk.matmul, A, A).cycles
    many = array(90 * 90 * 4, 3, 3)
    local = estimate(jax.vmap(jnp.matmul), many, many)
    assert local.moves == 0 and local.flops == pytest.approx(90 * 90 * 4 * 54)


def test_a_small_factor_is_flooded():
    e = estimate(lambda w, x: w @ x, array(3, 3), array(3, 81_000))
    assert e.assumed == {
        "dot_general as a flood of its smaller factor": next(iter(e.assumed.values()))
    }
    assert e.received == 3 * 3 / 2 and e.moves == 1


@pytest.mark.parametrize(("M", "N"), [(4, 4), (64, 64), (3, 300)])
def test_a_long_common_dimension_is_cut_into_slices(M, N):
    """Every PE multiplies its slice; one all-reduce adds up M N numbers."""
    K = 1 << 18
    e = estimate(lambda a, b: a @ b, array(M, K), array(K, N), grid=(64, 64))
    assert list(e.assumed) == ["dot_general as a sum over slices of K"]
    assert e.flops == pytest.approx(2 * M * K * N)
    # Of each PE: its slice's multiply-accumulates, eight a cycle, and the sums in and out.
    assert e.cycles > M * N * K / 64**2 / 8 + 2 * M * N
    assert e.cycles < 20 * (M * N * K / 64**2 / 8 + 2 * M * N)


@pytest.mark.parametrize("shape", [(300, 5000, 8), (2000, 300, 40), (900, 900, 12)])
def test_a_skinny_product_costs_no_more_than_its_transpose(shape):
    M, K, N = shape
    plain = estimate(lambda a, b: a @ b, array(M, K), array(K, N), grid=(64, 64))
    turned = estimate(lambda a, b: a @ b, array(N, K), array(K, M), grid=(64, 64))
    assert plain.cycles <= 1.01 * turned.cycles


@pytest.mark.parametrize("shape", [(30, 100, 30), (100, 40, 1000), (4, 5000, 4)])
@pytest.mark.parametrize("form", ["nn", "nt", "tn", "two", "gradient"])
def test_padding_is_no_work(shape, form):
    """Its cycles count, but the operations are those that were asked for."""
    M, K, N = shape
    run = {
        "nn": wk.matmul,
        "nt": lambda a, b: wk.matmul(a, b.T, transpose_b=True),
        "tn": lambda a, b: wk.matmul(a.T, b, transpose_a=True),
        "two": lambda a, b: wk.matmul(a, (b, b)),
        "gradient": jax.grad(lambda a, b: wk.matmul(a, b).sum(), (0, 1)),
    }[form]
    e = estimate(run, array(M, K), array(K, N), grid=(16, 16))
    products = 2 if form in ("two", "gradient") else 1
    assert e.flops == pytest.approx(products * 2 * M * K * N, rel=0.06)
    assert estimate(wk.gemv, array(3, 100), array(100, 30), grid=(16, 16)).flops == 2 * 3 * 100 * 30


@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_a_convolution_is_a_product_and_a_rim(groups):
    image, filters = array(1, 16, 180, 180), array(16, 16 // groups, 3, 3)
    run = functools.partial(
        lax.conv_general_dilated, window_strides=(1, 1), padding="SAME", feature_group_count=groups
    )
    e = estimate(run, image, filters)
    assert e.flops == pytest.approx(2 * 16 * 180 * 180 * 9 * 16 / groups, rel=0.01)
    # Two rows and two columns of 16 channels cross from tile to tile, and the filters are flooded.
    shifts = [line for name, line, _ in e.by_operation if name == "shift"]
    assert shifts and e.moves >= 3 and not e.unknown
    rims = 2 * 2 * 2 * 16 / 2
    assert e.received >= rims


def test_one_pe_multiplies_by_itself():
    e = estimate(lambda a, b: a @ b, array(8, 8), array(8, 8), grid=(1, 1))
    assert e.moves == 0 and not e.assumed and e.flops == 2 * 8**3


def test_a_product_of_any_kind_costs_as_much_within_a_tile():
    """Convolutions and ragged products of a PE's tiles; complex ones are four real ones."""
    wafer = wk.Wafer.abstract(wk.WSE3, 2, 2)
    spec = jax.sharding.PartitionSpec("y")

    def of_tiles(function, *operands):
        run = wafer.map(function, in_specs=spec, out_specs=spec)
        e = wk.estimate(run, *operands, wafer=wafer)
        assert not e.unknown
        return e

    plain = of_tiles(lambda a, b: a @ b, array(128, 72), array(144, 16))
    image, filters = array(2, 8, 10, 10), array(32, 8, 3, 3)
    conv = of_tiles(lambda x, k: lax.conv(x, k, (1, 1), "VALID"), image, filters)
    assert conv.flops == plain.flops and conv.cycles == plain.cycles
    groups = array(4, dtype=jnp.int32)
    ragged = of_tiles(lax.ragged_dot, array(128, 72), array(4, 72, 16), groups)
    assert ragged.flops == plain.flops
    wide = of_tiles(lambda a, b: a @ b, *(array(64, 32, dtype=t) for t in 2 * ["complex64"]))
    real = of_tiles(lambda a, b: a @ b, *(array(64, 32, dtype=t) for t in 2 * ["float32"]))
    assert wide.flops == 4 * real.flops and wide.cycles > 3 * real.cycles
    alone = functools.partial(estimate, grid=(1, 1))
    assert not alone(lambda x, k: lax.conv(x, k, (1, 1), "VALID"), image, filters).unknown


def test_groups_of_rows_are_products_of_their_own():
    """Forward and both gradients: as many operations each, whichever side is ragged."""
    tokens, matrices, sizes = array(640, 64), array(4, 64, 32), array(4, dtype=jnp.int32)
    run = lambda x, w, n: lax.ragged_dot(x, w, n)  # noqa: E731
    e = estimate(run, tokens, matrices, sizes)
    assert e.flops == pytest.approx(2 * 640 * 64 * 32, rel=0.01) and not e.unknown
    loss = lambda x, w, n: run(x, w, n).astype(jnp.float32).sum()  # noqa: E731
    both = estimate(jax.grad(loss, (0, 1)), tokens, matrices, sizes)
    assert both.flops == pytest.approx(2 * e.flops, rel=0.1)
