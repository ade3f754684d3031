"""`gemv` equals the plain product, and moves nothing but sums."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk


def whole_numbers(*shape):
    return np.random.default_rng(shape).integers(-15, 16, shape).astype(np.float32)


def product(wafer, **options):
    return functools.partial(wk.gemv, wafer=wafer, **options)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_equals_the_plain_product(wafer, transpose_b):
    x, b = whole_numbers(13), whole_numbers(13, 7)
    run = jax.jit(product(wafer, transpose_b=transpose_b))
    np.testing.assert_array_equal(run(x, b.T if transpose_b else b), x @ b)


@pytest.mark.parametrize("leading", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("transpose_b", [False, True])
def test_gradients_with_bias_and_activation(full_wafer, transpose_b, leading):
    rng = np.random.default_rng(0)
    x, b, bias, dy = (
        np.float32(rng.normal(size=size)) for size in ((*leading, 13), (13, 7), 7, (*leading, 7))
    )

    def results(wafer):
        @jax.jit
        def call(x, b, bias, dy):
            run = product(wafer, activation="silu", transpose_b=transpose_b)
            y, pullback = jax.vjp(lambda x, b, bias: run(x, b, bias=bias), x, b, bias)
            return y, *pullback(dy)

        return call(x, b.T if transpose_b else b, bias, dy)

    for got, want in zip(results(full_wafer), results(None), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_int8_weights(full_wafer, transpose_b):
    x, b, dy = whole_numbers(3, 13), whole_numbers(13, 7), whole_numbers(3, 7)
    scales = np.float32(2.0 ** np.arange(7))

    @jax.jit
    def call(x, b, scales, dy):
        run = product(full_wafer, transpose_b=transpose_b)
        y, pullback = jax.vjp(lambda x, b, s: run(x, b, scales=s), x, b, scales)
        dx, _, dscales = pullback(dy)
        return y, dx, dscales

    y, dx, dscales = call(x, (b.T if transpose_b else b).astype(np.int8), scales, dy)
    np.testing.assert_array_equal(y, x @ b * scales)
    np.testing.assert_array_equal(dx, (dy * scales) @ b.T)
    np.testing.assert_array_equal(dscales, (x @ b * dy).sum(0))


@pytest.mark.parametrize("transpose_b", [False, True])
def test_precision_is_that_of_every_product(full_wafer, transpose_b):
    run = product(full_wafer, transpose_b=transpose_b, precision="highest")
    x, b = jnp.ones(8), jnp.ones((8, 8))
    program = jax.jit(lambda x, b, dy: jax.vjp(run, x, b)[1](dy)).lower(x, b, x).as_text()
    precisions = re.findall(r"stablehlo.dot_general.* precision = (\[\w+, \w+\])", program)
    assert len(precisions) >= 2 and set(precisions) == {"[HIGHEST, HIGHEST]"}


def test_a_chain_alternates_axes_and_moves_only_sums(as_shipped):
    """One sum a product: no word of a matrix moves, and no vector is laid out anew."""
    wafer = wk.Wafer.devices(2, 4)
    b = wafer.shard(jnp.ones((64, 64)))

    def chain(x, b):
        once = wk.gemv(x, b, wafer=wafer)
        return wk.gemv(once, b, transpose_b=True, wafer=wafer)

    lowered = jax.jit(chain).lower(jnp.ones(64), b)
    text = lowered.compile(compiler_options=as_shipped).as_text()
    assert text is not None and text.count("all-reduce(") == 2
    for other in ("all-gather(", "collective-permute(", "all-to-all("):
        assert other not in text


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3,), (4, 5)), {}, r"x's length \(3\) must equal b's rows \(4\)"),
        (((4,), (4, 5)), {"transpose_b": True}, r"must equal b's columns \(5\)"),
        (((4,), (2, 4, 5)), {}, "b two; use matmul for other products"),
        (((4,), (4, 5)), {"bias": jnp.ones(4)}, r"bias is \(4,\), it must be \(5,\)"),
        (((4,), (4, 5)), {"activation": "swish"}, "activation='swish' is not one of"),
    ],
)
def test_refuses(shapes, options, message):
    with pytest.raises(ValueError, match=f"^gemv: .*{message}"):
        wk.gemv(*map(jnp.ones, shapes), **options)
