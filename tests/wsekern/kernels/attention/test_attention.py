"""Attention on every kind of wafer against all scores at once: results, gradients, programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import wsekern as wk
from wsekern.kernels.attention import plan

HEADS = P("wafer", "y", "x", None)
# B T S N K H
DIVIDES, PADDED = (2, 8, 8, 4, 4, 4), (3, 5, 7, 6, 3, 3)
SHAPES = {
    "more queries than keys": (1, 11, 5, 4, 2, 4),
    "more keys than queries": (1, 3, 10, 4, 2, 4),
    "one head of keys for all": (2, 6, 6, 6, 1, 4),
    "heads of keys repeated in part": (1, 6, 6, 12, 3, 4),
    "heads that do not divide x": (1, 6, 6, 5, 5, 4),
    "fewer tokens than rows of PEs": (1, 1, 1, 1, 1, 2),
}
both = pytest.mark.parametrize("algorithm", ["ring", "allgather"])
causal_or_full = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def operands(shape, dtype=np.float32):
    B, T, S, N, K, H = shape
    rng = np.random.default_rng(shape)
    sizes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return tuple(rng.standard_normal(size).astype(dtype) for size in sizes)


def plain(q, k, v, causal=False, scale=None):
    """Attention with all scores at once, and a head of keys for each head of queries."""
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.stack([x[:, :, n // group] for n in range(q.shape[2])], 2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (scale or q.shape[-1] ** -0.5)
    if causal:
        scores += np.triu(np.full(scores.shape, -1e9, np.float32), 1)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)


@functools.cache
def plain_results(shape, causal):
    """The plain result and gradients in float64, for `operands(shape)` and `dout_of(shape)`."""
    run = with_gradients(functools.partial(plain, causal=causal))
    with jax.enable_x64(True):
        return run(*(np.float64(x) for x in (*operands(shape), dout_of(shape))))


def dout_of(shape):
    B, T, S, N, K, H = shape
    return np.random.default_rng(0).standard_normal((B, T, N, H), np.float32)


def attend(wafer, algorithm="auto", **options):
    return functools.partial(wk.attention, algorithm=algorithm, wafer=wafer, **options)


def with_gradients(run):
    @jax.jit
    def call(q, k, v, dout):
        out, pullback = jax.vjp(run, q, k, v)
        return out, *pullback(dout)

    return call


def assert_right(run, shape, causal):
    """The result and all gradients are the plain ones."""
    got = with_gradients(run)(*operands(shape), dout_of(shape))
    for x, want in zip(got, plain_results(shape, causal), strict=True):
        np.testing.assert_allclose(x, want, atol=3e-6, rtol=1e-5)


def largest(wafer, run, shape):
    """Elements of the largest array that one PE holds, forward and backward."""
    B, T, S, N, K, H = shape
    laid_out = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    q, dout = (laid_out((B, T, N, H), sharding=wafer.sharding(HEADS)) for _ in range(2))
    k, v = (laid_out((B, S, K, H), sharding=wafer.sharding(HEADS)) for _ in range(2))
    program = with_gradients(run).lower(q, k, v, dout).compile().as_text()
    sizes = re.findall(r"f32\[([\d,]+)\]", program)
    return max(np.prod([int(n) for n in size.split(",")]) for size in sizes)


@both
@pytest.mark.parametrize(
    ("shape", "causal"),
    [(DIVIDES, False), (PADDED, True)],
    ids=["divides, full", "padded, causal"],
)
def test_equals_the_plain_attention(wafer, algorithm, shape, causal):
    out = jax.jit(attend(wafer, algorithm, causal=causal))(*operands(shape))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, plain_results(shape, causal)[0], atol=1e-6, rtol=1e-5)


@both
def test_bfloat16_values_are_summed_in_float32(wafer, algorithm):
    """Of equal scores the result is the mean, exactly; partial sums in bfloat16 would not be."""
    v = np.random.default_rng(0).integers(0, 32, (2, 64, 4, 4)).astype(np.float32)
    out = jax.jit(attend(wafer, algorithm))(*(jnp.bfloat16(x) for x in (0 * v, v, v)))
    mean = v.mean(1, keepdims=True).astype(jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, np.broadcast_to(mean, v.shape))


@both
def test_bfloat16_is_as_near_as_its_digits(algorithm):
    q, k, v = operands(PADDED, jnp.bfloat16)
    run = attend(wk.Wafer.devices(2, 4), algorithm, causal=True)
    got = with_gradients(run)(q, k, v, q)
    want = with_gradients(functools.partial(plain, causal=True))(
        *(x.astype(np.float32) for x in (q, k, v, q))
    )
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, atol=2**-6, rtol=2**-6)


@both
@causal_or_full
def test_gradients_equal_the_plain_ones(full_wafer, algorithm, causal):
    assert_right(attend(full_wafer, algorithm, causal=causal), PADDED, causal)


@pytest.mark.parametrize("algorithm", [pytest.param("ring", marks=pytest.mark.slow), "allgather"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_results_and_gradients_of_any_shape(algorithm, shape):
    assert_right(attend(wk.Wafer.devices(2, 4), algorithm, causal=True), shape, True)


@pytest.mark.slow
@both
@causal_or_full
def test_a_tile_is_taken_in_blocks(monkeypatch, algorithm, causal):
    monkeypatch.setattr(plan, "_BLOCK", 8)
    shape = (1, 51, 37, 4, 2, 4)  # 26 and 19 rows a PE: 4 and 3 blocks
    assert_right(attend(wk.Wafer.devices(2, 2), algorithm, causal=causal), shape, causal)


@pytest.mark.slow
@both
def test_a_virtual_tile_is_taken_in_blocks(monkeypatch, algorithm):
    monkeypatch.setattr(plan, "_BLOCK", 8)
    shape = (1, 37, 51, 4, 2, 4)
    assert_right(attend(wk.Wafer.virtual(wk.WSE2, 2, 2), algorithm, causal=True), shape, True)


@pytest.mark.slow
@both
def test_no_scores_are_larger_than_a_block(monkeypatch, algorithm):
    wafer, shape = wk.Wafer.devices(2, 2), (1, 128, 128, 2, 2, 2)
    whole = largest(wafer, attend(wafer, algorithm), shape)
    monkeypatch.setattr(plan, "_BLOCK", 16)
    assert largest(wafer, attend(wafer, algorithm), shape) < whole / 4


@both
def test_large_scores_do_not_overflow(algorithm):
    q, k, v = operands(PADDED)
    out = jax.jit(attend(wk.Wafer.devices(2, 4), algorithm))(100 * q, 100 * k, v)
    np.testing.assert_allclose(out, jax.jit(plain)(100 * q, 100 * k, v), atol=1e-3)


@both
def test_scale_multiplies_the_scores(algorithm):
    q, k, v = operands(PADDED)
    out = jax.jit(attend(wk.Wafer.virtual(wk.WSE2, 2, 4), algorithm, scale=0.3))(q, k, v)
    want = jax.jit(functools.partial(plain, scale=0.3))(q, k, v)
    np.testing.assert_allclose(out, want, atol=1e-6, rtol=1e-5)


def test_the_ring_gathers_nothing():
    run = attend(wk.Wafer.devices(4, 2), "ring", causal=True)
    q, k, v = operands(DIVIDES)
    forward = jax.jit(run).lower(q, k, v).as_text()
    gradient = with_gradients(run).lower(q, k, v, q).as_text()
    for program in (forward, gradient):
        assert "stablehlo.collective_permute" in program
        for other in ("all_gather", "all_reduce", "all_to_all", "reduce_scatter"):
            assert other not in program


@pytest.mark.slow
@causal_or_full
def test_the_ring_holds_no_row_of_all_scores(causal):
    wafer, shape = wk.Wafer.devices(4, 2), (1, 64, 64, 2, 2, 2)
    rows = 64 // 4 * 64  # scores of a PE's queries and all keys
    assert largest(wafer, attend(wafer, "ring", causal=causal), shape) < rows
    assert largest(wafer, attend(wafer, "allgather", causal=causal), shape) >= rows


@both
def test_the_gradient_keeps_operands_and_a_word_a_row(algorithm):
    B, T, S, N, K, H = DIVIDES
    run = attend(wk.Wafer.devices(2, 4), algorithm)
    kept = jax.eval_shape(lambda *qkv: jax.vjp(run, *qkv)[1], *operands(DIVIDES))
    shapes = sorted(x.shape for x in jax.tree.leaves(kept))
    assert shapes == sorted([(B, T, N, H)] * 2 + [(B, S, K, H)] * 2 + [(B, N, T)])


def test_auto_gathers_while_that_is_little():
    def program(S):
        q, k = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32) for length in (8, S))
        return jax.jit(attend(wk.Wafer.devices(2, 2))).lower(q, k, k).as_text()

    assert "all_gather" in program(8)
    assert "all_gather" not in program(2**16)


def test_runs_on_the_wafer_in_force():
    q, k, v = operands(PADDED)
    run = jax.jit(lambda q, k, v: wk.attention(q, k, v, algorithm="ring"))
    plainly = run(q, k, v)
    with wk.Wafer.devices(2, 4):
        assert "stablehlo.collective_permute" in run.lower(q, k, v).as_text()
        np.testing.assert_allclose(run(q, k, v), plainly, atol=1e-6)


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), r"q is \(4, 2, 8\), it must have four dimensions"),
        ((1, 4, 2, 8), (1, 4, 2, 8), (1, 5, 2, 8), "k is .* and v is .*: they must be alike"),
        ((1, 4, 2, 8), (3, 4, 2, 8), (3, 4, 2, 8), r"their batches \(1 and 3\) must be equal"),
        ((1, 4, 2, 8), (1, 4, 2, 6), (1, 4, 2, 6), r"their head sizes \(8 and 6\) must be equal"),
        ((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8), "q has 3 heads and k has 2"),
        ((1, 4, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8), "neither may be empty"),
    ],
)
def test_refuses_shapes_that_do_not_fit(wafer, q, k, v, message):
    with pytest.raises(ValueError, match=f"^attention: .*{message}"):
        wk.attention(*(jnp.ones(shape) for shape in (q, k, v)), wafer=wafer)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        (("float32", "float32", "bfloat16"), "v is bfloat16: cast them to one dtype"),
        (("int32", "int32", "int32"), "q, k and v are int32; cast them to a floating dtype"),
    ],
)
def test_refuses_dtypes_that_do_not_fit(dtypes, message):
    q, k, v = (jnp.ones((1, 4, 2, 8), dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=message):
        wk.attention(q, k, v)


@pytest.mark.refuses
def test_refuses_an_unknown_algorithm():
    q, k, v = operands(DIVIDES)
    message = "algorithm='flash' is not one of 'auto', 'ring', 'allgather', 'ulysses'"
    with pytest.raises(ValueError, match=message):
        attend(None, "flash")(q, k, v)


def test_grouped_heads_on_explicit_axes_need_no_size_that_divides():
    mesh = jax.make_mesh((2, 2, 2), ("d", "a", "b"), axis_types=(AxisType.Explicit,) * 3)
    wafer = wk.Wafer.of(mesh, y="a", x="b", wafer="d")
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(3, 7, n, 4)).astype(np.float32) for n in (4, 1, 1))

    def total(wafer):
        return jax.jit(
            jax.grad(lambda q, k, v: (wk.attention(q, k, v, wafer=wafer) ** 2).sum(), (0, 1, 2))
        )

    with jax.set_mesh(mesh):
        got = total(wafer)(q, k, v)
    for x, y in zip(got, total(None)(q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["MHA", "GQA"])
def test_bfloat16_gradients_with_several_heads_a_pe(heads):
    """What XLA's CPU backend cannot multiply in 16 bits is widened."""
    N, K = heads
    q, k, v = (jnp.ones((2, 64, n, 32), jnp.bfloat16) for n in (N, K, K))
    run = functools.partial(wk.attention, causal=True, wafer=wk.Wafer.devices(2, 2))
    gradient = jax.jit(jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2)))
    dq, dk, dv = gradient(q, k, v)
    assert dq.dtype == dk.dtype == dv.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(dv).sum(), q.size, rtol=1e-2)
