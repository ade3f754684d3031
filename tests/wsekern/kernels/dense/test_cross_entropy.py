"""Cross-entropy over a split vocabulary against its definition in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import wsekern as wk

DIVIDES, PADDED, MATRIX = (2, 8, 16), (3, 5, 19), (5, 19)  # [B,] T, V
shapes = pytest.mark.parametrize("shape", [DIVIDES, PADDED, MATRIX], ids=str)


def operands(shape, vocab=None):
    rng = np.random.default_rng(shape)
    logits = 5 * rng.standard_normal(shape).astype(np.float32)
    return logits, rng.integers(0, vocab or shape[-1], shape[:-1], np.int32)


def plain(logits, labels):
    """The loss of every token, in float64, by the definition."""
    logits = np.float64(logits)
    of_labels = np.sum(logits * np.eye(logits.shape[-1])[labels], -1)
    return np.log(np.sum(np.exp(logits), -1)) - of_labels


def plain_gradient(logits, labels, dlosses):
    exponentials = np.exp(np.float64(logits))
    softmax = exponentials / exponentials.sum(-1, keepdims=True)
    return (softmax - np.eye(logits.shape[-1])[labels]) * dlosses[..., None]


def weights(labels):
    return np.random.default_rng(0).standard_normal(labels.shape).astype(np.float32)


def loss(wafer, **options):
    return functools.partial(wk.cross_entropy, wafer=wafer, **options)


def with_gradient(run):
    @jax.jit
    def call(logits, labels, dlosses):
        losses, pullback = jax.vjp(lambda logits: run(logits, labels), logits)
        return losses, *pullback(dlosses)

    return call


@shapes
def test_equals_the_plain_loss(wafer, shape):
    logits, labels = operands(shape)
    losses = jax.jit(loss(wafer))(logits, labels)
    np.testing.assert_allclose(losses, plain(logits, labels), rtol=1e-5, atol=2e-6)


def test_bfloat16_logits_give_a_float32_loss(wafer):
    logits, labels = operands(PADDED)
    logits = logits.astype(jnp.bfloat16)
    losses, dlogits = with_gradient(loss(wafer))(logits, labels, weights(labels))
    assert losses.dtype == jnp.float32
    assert dlogits.dtype == jnp.bfloat16
    np.testing.assert_allclose(losses, plain(logits, labels), rtol=1e-5, atol=2e-6)
    want = plain_gradient(logits, labels, weights(labels))
    np.testing.assert_allclose(np.float32(dlogits), want, rtol=2**-8, atol=1e-6)


def test_a_large_vocabulary_is_summed_in_float32(full_wafer):
    """Of equal logits the loss is the logarithm of the vocabulary."""
    logits, labels = jnp.zeros((2, 3, 1001), jnp.bfloat16), np.zeros((2, 3), np.int32)
    losses = jax.jit(loss(full_wafer))(logits, labels)
    np.testing.assert_allclose(losses, np.log(1001), rtol=1e-6)


@shapes
def test_gradient_equals_the_plain_one(full_wafer, shape):
    logits, labels = operands(shape)
    _, dlogits = with_gradient(loss(full_wafer))(logits, labels, weights(labels))
    want = plain_gradient(logits, labels, weights(labels))
    np.testing.assert_allclose(dlogits, want, rtol=1e-5, atol=1e-6)


def test_columns_beyond_the_vocabulary_count_for_nothing(wafer):
    vocab = 5  # where x is 4 wide, one PE has one word and two have none
    logits, labels = operands(DIVIDES, vocab)
    logits[..., vocab:] = 1e4
    losses, dlogits = with_gradient(loss(wafer, vocab=vocab))(logits, labels, weights(labels))
    words = logits[..., :vocab]
    np.testing.assert_allclose(losses, plain(words, labels), rtol=1e-5, atol=2e-6)
    want = plain_gradient(words, labels, weights(labels))
    np.testing.assert_allclose(dlogits[..., :vocab], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dlogits[..., vocab:], 0)


def test_an_unknown_label_is_nan_and_pulls_toward_no_word(wafer):
    logits, labels = operands(PADDED, 13)
    dlosses, unknown = weights(labels), np.zeros(labels.shape, bool)
    labels[1:, 2:] = [[-1, -19, 13], [18, 19, 2**31 - 1]]
    unknown[1:, 2:] = True
    losses, dlogits = with_gradient(loss(wafer, vocab=13))(logits, labels, dlosses)
    np.testing.assert_array_equal(np.isnan(losses), unknown)
    want = plain_gradient(logits[..., :13], np.where(unknown, 0, labels), dlosses)
    want[unknown, 0] += dlosses[unknown]
    np.testing.assert_allclose(dlogits[..., :13], want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(dlogits[..., 13:], 0)


@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 4)], ids=["local", "wafer"])
def test_large_logits_do_not_overflow(wafer):
    logits = np.array([[1e4, -1e4, 0, 1e4], [-1e4, -1e4, -1e4, -1e4 - 1]], np.float32)
    labels = np.array([1, 3], np.int32)
    losses, dlogits = with_gradient(loss(wafer))(logits, labels, np.ones(2, np.float32))
    np.testing.assert_allclose(losses, [2e4 + np.log(2), 1 + np.log(3 + np.exp(-1))], rtol=1e-3)
    # The log-sum-exp is kept in float32, whose digits near 1e4 are 1e-3 apart.
    np.testing.assert_allclose(dlogits[0], [0.5, -1, 0, 0.5], rtol=1e-3)


def test_infinite_logits_are_as_in_logsumexp(wafer):
    """A word ruled out by -inf, a row of them alone, and +inf."""
    logits = jnp.zeros((1, 4, 8)).at[0, 1, 2:].set(-jnp.inf).at[0, 2].set(-jnp.inf)
    logits = logits.at[0, 3, 5].set(jnp.inf)
    labels = jnp.array([[0, 7, 0, 0]])
    got = jax.jit(functools.partial(wk.cross_entropy, wafer=wafer))(logits, labels)
    np.testing.assert_allclose(got[0], [np.log(8), np.inf, np.nan, np.inf], rtol=1e-6)


def test_no_pe_holds_all_logits_of_a_token(as_shipped):
    wafer, V = wk.Wafer.devices(2, 4), 97 * 4
    tiled, rows = wafer.sharding(P("wafer", "y", "x")), wafer.sharding(P("wafer", "y"))
    logits = jax.ShapeDtypeStruct((2, 4, V), jnp.float32, sharding=tiled)
    labels = jax.ShapeDtypeStruct((2, 4), jnp.int32, sharding=rows)
    dlosses = jax.ShapeDtypeStruct((2, 4), jnp.float32, sharding=rows)
    lowered = with_gradient(loss(wafer)).lower(logits, labels, dlosses)
    program = lowered.compile(compiler_options=as_shipped).as_text()
    sizes = {n for dims in re.findall(r"\w\[([\d,]+)\]", program) for n in dims.split(",")}
    assert "97" in sizes
    assert str(V) not in sizes


def test_two_reductions_forward_and_none_backward():
    logits, labels = operands(DIVIDES)
    run = loss(wk.Wafer.devices(2, 4))
    forward = jax.jit(run).lower(logits, labels).as_text()
    gradient = with_gradient(run).lower(logits, labels, weights(labels)).as_text()
    for program in (forward, gradient):
        assert program.count("stablehlo.all_reduce") == 2
        for other in ("all_gather", "all_to_all", "reduce_scatter", "collective_permute"):
            assert other not in program


def test_the_gradient_keeps_a_word_a_token():
    logits, labels = operands(DIVIDES)
    run = loss(wk.Wafer.devices(2, 4))
    kept = jax.eval_shape(lambda x, y: jax.vjp(lambda x: run(x, y), x)[1], logits, labels)
    shapes = sorted(x.shape for x in jax.tree.leaves(kept))
    assert shapes == sorted([logits.shape, labels.shape, labels.shape])


def test_runs_on_the_wafer_in_force():
    logits, labels = operands(PADDED)
    run = jax.jit(lambda logits, labels: wk.cross_entropy(logits, labels))
    plainly = run(logits, labels)
    with wk.Wafer.devices(2, 4):
        assert "stablehlo.all_reduce" in run.lower(logits, labels).as_text()
        np.testing.assert_allclose(run(logits, labels), plainly, rtol=1e-6, atol=1e-6)


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((8,), (), r"logits is \(8,\), it must have two dimensions or more"),
        ((4, 8), (5,), r"labels is \(5,\) and logits is \(4, 8\): labels must be \(4,\)"),
        ((2, 4, 8), (4,), r"labels must be \(2, 4\), one word a row"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wafer, logits, labels, message):
    with pytest.raises(ValueError, match=f"^cross_entropy: .*{message}"):
        wk.cross_entropy(jnp.ones(logits), jnp.zeros(labels, int), wafer=wafer)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ("int32", "int32", "logits is int32; cast it to a floating dtype"),
        ("float32", "float32", "labels is float32; cast it to an integer dtype"),
    ],
)
def test_refuses_dtypes_that_do_not_fit(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        wk.cross_entropy(jnp.ones((4, 8), logits), jnp.zeros(4, labels))


@pytest.mark.parametrize("vocab", [0, -1, 9])
def test_refuses_a_vocabulary_out_of_range(vocab):
    with pytest.raises(ValueError, match=f"vocab={vocab} .* it must be from 1 to 8"):
        wk.cross_entropy(jnp.ones((4, 8)), jnp.zeros(4, int), vocab=vocab)


@pytest.mark.parametrize("V", [256, 300])
def test_a_vocabulary_may_be_larger_than_what_the_labels_dtype_holds(V):
    run = jax.jit(functools.partial(wk.cross_entropy, wafer=wk.Wafer.devices(2, 2)))
    losses = run(np.zeros((4, V), np.float32), np.array([0, 1, 255, 44], np.uint8))
    np.testing.assert_allclose(losses, np.log(V), rtol=1e-6)


def test_it_can_be_differentiated_twice():
    def curvature(wafer):
        def loss(x):
            return wk.cross_entropy(x, jnp.array([1, 2]), wafer=wafer).sum()

        return jax.jit(jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()))

    x = jnp.sin(jnp.arange(10.0)).reshape(2, 5)
    got, want = curvature(wk.Wafer.devices(2, 2))(x), curvature(None)(x)
    np.testing.assert_allclose(got, want, atol=1e-5)
