"""RMSNorm and LayerNorm over split features against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

DIVIDES, PADDED, MATRIX = (2, 8, 64), (3, 5, 19), (5, 19)  # [B,] T, D
NORMS = {
    "rms": (wk.rms_norm, 1),
    "layer": (wk.layer_norm, 1),
    "layer with bias": (wk.layer_norm, 2),
}
every_norm = pytest.mark.parametrize("norm", NORMS)
both_norms = pytest.mark.parametrize("norm", ["rms", "layer with bias"])


def operands(norm, shape):
    """Rows, and the weights that `norm` takes."""
    rng = np.random.default_rng(shape)
    weights = rng.standard_normal((NORMS[norm][1], shape[-1])).astype(np.float32)
    return (1 + rng.standard_normal(shape).astype(np.float32), *weights)


def gradient_of(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def plain(norm, eps=None):
    """By the definition, in whatever dtype the operands are."""

    def call(x, scale, bias=0.0):
        if norm == "rms":
            return x / (jnp.mean(x**2, -1, keepdims=True) + (eps or 1e-6)) ** 0.5 * row(scale, x)
        variance = jnp.var(x, -1, keepdims=True)
        normal = (x - jnp.mean(x, -1, keepdims=True)) / (variance + (eps or 1e-5)) ** 0.5
        return normal * row(scale, x) + (row(bias, x) if norm == "layer with bias" else 0.0)

    return call


def row(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def norm_on(norm, wafer, **options):
    return functools.partial(NORMS[norm][0], wafer=wafer, **options)


def with_gradients(run):
    @jax.jit
    def call(dy, *operands):
        y, pullback = jax.vjp(run, *operands)
        return y, *pullback(dy)

    return call


@functools.cache
def plain_program(norm):
    return jax.jit(plain(norm))


@functools.cache
def plain_with_gradients(norm):
    return with_gradients(plain(norm))


@both_norms
@pytest.mark.parametrize("shape", [DIVIDES, PADDED], ids=["divides", "padded"])
def test_equals_the_plain_norm(wafer, norm, shape):
    y = jax.jit(norm_on(norm, wafer))(*operands(norm, shape))
    assert y.dtype == jnp.float32
    want = plain_program(norm)(*operands(norm, shape))
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=5e-6)


@both_norms
def test_bfloat16_is_summed_in_float32(wafer, norm):
    low = [x.astype(jnp.bfloat16) for x in operands(norm, (3, 301))]
    y = jax.jit(norm_on(norm, wafer))(*low)
    assert y.dtype == jnp.bfloat16
    want = plain_program(norm)(*(x.astype(np.float32) for x in low))
    np.testing.assert_allclose(np.float32(y), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [("rms", PADDED), ("rms", MATRIX), ("layer", MATRIX), ("layer with bias", PADDED)],
)
def test_results_and_gradients_equal_the_plain_ones(full_wafer, norm, shape):
    dy = gradient_of(shape)
    got = with_gradients(norm_on(norm, full_wafer))(dy, *operands(norm, shape))
    want = plain_with_gradients(norm)(dy, *operands(norm, shape))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@both_norms
def test_bfloat16_gradients_are_as_near_as_their_digits(norm):
    low = [x.astype(jnp.bfloat16) for x in (gradient_of(PADDED), *operands(norm, PADDED))]
    got = with_gradients(norm_on(norm, wk.Wafer.devices(2, 4)))(*low)
    want = plain_with_gradients(norm)(*(x.astype(np.float32) for x in low))
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, rtol=2**-7, atol=1e-4)


def test_gradients_of_many_rows_are_summed_in_float32(full_wafer):
    """In bfloat16 a sum of ones ends at 256."""
    x, scale, bias = (a.astype(jnp.bfloat16) for a in operands("layer with bias", (2, 150, 9)))
    run = with_gradients(norm_on("layer with bias", full_wafer))
    *_, dbias = run(jnp.ones_like(x), x, scale, bias)
    np.testing.assert_array_equal(dbias, 300)


@both_norms
def test_columns_beyond_the_features_count_for_nothing(wafer, norm):
    shape, features = (2, 3, 16), 5  # where x is 4 wide, one PE has one of them and two have none
    dy, (x, *weights) = gradient_of(shape), operands(norm, shape)
    x[..., features:] = 0
    for weight in weights:
        weight[features:] = 0
    got = with_gradients(norm_on(norm, wafer, features=features))(dy, x, *weights)
    real = [a[..., :features] for a in (dy, x, *weights)]
    for value, want in zip(got, plain_with_gradients(norm)(*real), strict=True):
        np.testing.assert_allclose(value[..., :features], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(value[..., features:], 0)


@pytest.mark.parametrize("norm", ["layer", "layer with bias"])
@pytest.mark.parametrize("features", [64, 19])
def test_a_constant_row_is_the_bias(norm, features):
    shape = (2, 3, features)
    _, *weights = operands(norm, shape)
    run = with_gradients(norm_on(norm, wk.Wafer.devices(2, 4)))
    y, dx, *_ = run(gradient_of(shape), np.full(shape, 3, np.float32), *weights)
    bias = weights[1] if len(weights) > 1 else np.zeros(features)
    np.testing.assert_allclose(y, np.broadcast_to(bias, shape), atol=1e-3)
    assert np.isfinite(dx).all()


@both_norms
def test_a_row_of_zeros_has_a_finite_gradient(norm):
    _, *weights = operands(norm, PADDED)
    run = with_gradients(norm_on(norm, wk.Wafer.virtual(wk.WSE2, 2, 4)))
    got = run(gradient_of(PADDED), np.zeros(PADDED, np.float32), *weights)
    for x in got:
        assert np.isfinite(x).all()


@every_norm
def test_eps_is_added_to_the_mean_square(norm):
    x, *weights = operands(norm, PADDED)
    y = jax.jit(norm_on(norm, wk.Wafer.devices(2, 4), eps=0.5))(x, *weights)
    want = jax.jit(plain(norm, eps=0.5))(x, *weights)
    np.testing.assert_allclose(y, want, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize(
    "wafer",
    [None, wk.Wafer.virtual(wk.WSE2, 2, 4), wk.Wafer.virtual(wk.WSE2, 3, 2)],
    ids=["local", "2x4", "3x2"],
)
@pytest.mark.parametrize("D", [64, 57, 8])
def test_a_large_mean_costs_the_variance_no_digits(wafer, D):
    x, scale = operands("layer", (2, 3, D))
    x += 1e4
    y = jax.jit(norm_on("layer", wafer))(x, scale)
    mean, variance = np.float64(x).mean(-1, keepdims=True), np.float64(x).var(-1, keepdims=True)
    want = (x - mean) / np.sqrt(variance + 1e-5) * scale[None, None]
    # Near 1e4 the digits of a mean in float32 are 1e-3 apart.
    np.testing.assert_allclose(y, want, atol=1e-2)


@pytest.mark.parametrize(
    ("norm", "D", "forward", "both"),
    [
        ("rms", 64, ["all_reduce"], ["all_reduce"] * 3),
        ("layer with bias", 64, ["all_gather"], ["all_gather", "all_reduce", "all_reduce"]),
        ("layer with bias", 16, ["all_reduce"] * 2, ["all_reduce"] * 4),
    ],
)
def test_one_move_a_row_forward_and_one_more_backward(norm, D, forward, both):
    """And one that sums the gradients of the weights."""
    run, x = norm_on(norm, wk.Wafer.devices(2, 4)), operands(norm, (2, 8, D))
    programs = jax.jit(run).lower(*x).as_text(), with_gradients(run).lower(x[0], *x).as_text()
    kinds = ("all_gather", "all_reduce", "all_to_all", "collective_permute", "reduce_scatter")
    for program, moves in zip(programs, (forward, both), strict=True):
        sent = [kind for kind in kinds for _ in range(program.count(f"stablehlo.{kind}"))]
        assert sent == moves


@every_norm
def test_the_gradient_keeps_a_word_or_two_a_row(norm):
    x, *weights = operands(norm, DIVIDES)
    run = norm_on(norm, wk.Wafer.devices(2, 4))
    kept = jax.eval_shape(lambda *operands: jax.vjp(run, *operands)[1], x, *weights)
    shapes = sorted(a.shape for a in jax.tree.leaves(kept) if a.ndim > 1)
    words = 1 if norm == "rms" else 2
    assert shapes == sorted([x.shape, *[x.shape[:-1]] * words])


@both_norms
def test_runs_on_the_wafer_in_force(norm):
    run = jax.jit(lambda *operands: NORMS[norm][0](*operands))
    x = operands(norm, PADDED)
    plainly = run(*x)
    with wk.Wafer.devices(2, 4):
        assert "stablehlo.all_" in run.lower(*x).as_text()
        np.testing.assert_allclose(run(*x), plainly, rtol=2e-5, atol=5e-6)


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@every_norm
@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((8,), (8,), r"x is \(8,\), it must have two dimensions or more"),
        ((4, 8), (7,), r"is \(7,\) and x is \(4, 8\): it must be \(8,\), one number a feature"),
        ((4, 8), (1, 8), r"is \(1, 8\) and x is \(4, 8\): it must be \(8,\)"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wafer, norm, x, weight, message):
    function, weights = NORMS[norm]
    scale = jnp.ones(weight if weights == 1 else x[-1:])
    bias = [jnp.ones(weight)] * (weights - 1)
    name = {1: "scale", 2: "bias"}[weights] if len(x) > 1 else ""
    with pytest.raises(ValueError, match=f"^{function.__name__}: {name}.*{message}"):
        function(jnp.ones(x), scale, *bias, wafer=wafer)


@pytest.mark.refuses
@every_norm
def test_refuses_integers(norm):
    function, weights = NORMS[norm]
    for at, name in enumerate(("x", "scale", "bias")[: weights + 1]):
        operands = [jnp.ones((4, 8)), *[jnp.ones(8)] * weights]
        operands[at] = operands[at].astype(int)
        with pytest.raises(ValueError, match=f"{name} is int32; cast it to a floating dtype"):
            function(*operands)


@every_norm
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps=0.0 must be a number above 0"),
        ({"eps": -1e-6}, "eps=-1e-06 must be a number above 0"),
        ({"features": 0}, r"features=0 and x is \(4, 8\): it must be from 1 to 8"),
        ({"features": 9}, r"features=9 and x is \(4, 8\): it must be from 1 to 8"),
    ],
)
def test_refuses_options_out_of_range(norm, options, message):
    function, weights = NORMS[norm]
    with pytest.raises(ValueError, match=message):
        function(jnp.ones((4, 8)), *[jnp.ones(8)] * weights, **options)
