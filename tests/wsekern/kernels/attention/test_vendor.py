"""Tiles by the kernels of platforms, interpreted, against one PE's blocks in jnp."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk
from wsekern.kernels.attention import implementation, plan, splash, vendor

# algorithm -> (grid, wafers, options, whether with segments and sinks)
CASES = {
    "zigzag": ("ring", (2, 2, 1), {"causal": True}, False),
    "zigzag with segments and sinks": ("ring", (2, 1, 2), {"causal": True}, True),
    "ring": ("ring", (2, 2, 1), {}, True),
    "ring with a window": ("ring", (2, 1, 1), {"causal": True, "window": 100}, False),
    "allgather": ("allgather", (2, 2, 1), {"causal": True, "soft_cap": 2.0}, False),
    "allgather with a window": ("allgather", (2, 1, 2), {"causal": True, "window": 60}, True),
    "balanced": ("allgather", (2, 1, 1), {"causal": True}, False),
    "balanced with segments and sinks": ("allgather", (2, 1, 2), {"causal": True}, True),
    "ulysses": ("ulysses", (2, 1, 1), {"causal": True}, False),
    "padded": ("allgather", (2, 1, 1), {}, False),
    "no wafer": ("auto", None, {"causal": True, "scale": 0.3}, True),
}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    for name in ("_Q_BLOCK", "_K_BLOCK", "_K_COMPUTE"):
        monkeypatch.setattr(splash, name, 128)


def operands(B, S, N, K, H):
    rng = np.random.default_rng((B, S, N, K, H))
    shapes = (B, S, N, H), (B, S, K, H), (B, S, K, H), (B, S, N, H), (N,)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (B, S))), jnp.int32)
    return tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes), ids


def with_gradients(run):
    @jax.jit
    def call(q, k, v, dout, sinks):
        out, pullback = jax.vjp(run, q, k, v, sinks)
        return out, *pullback(dout)

    return call


@pytest.mark.parametrize("kernel", ["splash", "pallas"])
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if "zigzag" in name else [])
        for name, case in CASES.items()
    ],
)
def test_results_and_gradients_are_those_of_the_blocks(case, kernel):
    algorithm, grid, options, more = case
    wafer = None if grid is None else wk.Wafer.devices(*grid)
    tall = algorithm == "ring" or options == {"causal": True}
    arrays, ids = operands(2, 300 if not options else 512 if tall else 256, 4, 2, 8)

    def attend(q, k, v, sinks, **kind):
        extra = {"sinks": sinks, "segment_ids": ids} if more else {}
        return wk.attention(q, k, v, **extra, **options, **kind)

    kind = {"implementation": kernel, "algorithm": algorithm, "wafer": wafer}
    got = with_gradients(functools.partial(attend, **kind))(*arrays)
    want = with_gradients(functools.partial(attend, implementation="xla"))(*arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("height", [3, 4])
def test_large_tiles_take_turns(monkeypatch, height):
    """One group of heads after the other, and the gradient of queries by a kernel of its own."""
    monkeypatch.setattr(plan, "_KEPT_BYTES", 0)
    monkeypatch.setattr(splash, "_PARTIAL_BYTES", 0)
    arrays, _ = operands(1, height * 256, 2, 2, 8)

    def attend(q, k, v, sinks, **kind):
        return wk.attention(q, k, v, causal=True, **kind)

    kind = {"implementation": "splash", "wafer": wk.Wafer.devices(height, 1)}
    got = with_gradients(functools.partial(attend, **kind))(*arrays)
    want = with_gradients(functools.partial(attend, implementation="xla"))(*arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("algorithm", "causal"), [("ulysses", False), ("ulysses", True), ("allgather", False)]
)
def test_whole_tiles_of_cudnn_are_moved_rightly(monkeypatch, algorithm, causal):
    """The path that cuDNN takes, with jax.nn's plain kernel in its place."""
    monkeypatch.setattr(vendor, "_CUDNN", "xla")
    monkeypatch.setattr(implementation, "_cudnn_refused", lambda task: "")
    arrays, _ = operands(2, 32, 8, 4, 8)

    def attend(q, k, v, sinks, **kind):
        return wk.attention(q, k, v, causal=causal, **kind)

    kind = {"implementation": "cudnn", "algorithm": algorithm, "wafer": wk.Wafer.devices(2, 2)}
    got = with_gradients(functools.partial(attend, **kind))(*arrays)
    want = with_gradients(attend)(*arrays)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6, rtol=1e-5)


def test_the_result_alone_computes_no_log_sum_exps():
    (q, k, v, *_), _ = operands(1, 256, 2, 1, 8)
    run = functools.partial(wk.attention, causal=True, implementation="splash")
    jaxpr = str(jax.make_jaxpr(run)(q, k, v))
    assert "splash_mha_fwd_no_residuals" in jaxpr and "splash_mha_fwd_residuals" not in jaxpr
    np.testing.assert_allclose(jax.jit(run)(q, k, v), wk.attention(q, k, v, causal=True), atol=2e-6)


@pytest.mark.parametrize("kernel", ["splash", "pallas"])
def test_a_row_that_sees_no_key_is_zero(kernel):
    (q, k, v, *_), _ = operands(1, 128, 2, 2, 8)
    ids = jnp.zeros((1, 128), jnp.int32).at[:, :5].set(7), jnp.zeros((1, 128), jnp.int32)
    run = functools.partial(wk.attention, segment_ids=ids, implementation=kernel)
    out, pullback = jax.vjp(jax.jit(run), q, k, v)
    dq, *_ = pullback(jnp.ones_like(out))
    for x in (out, dq):
        assert (
            not np.asarray(x)[:, :5].any() and np.isfinite(x).all() and np.asarray(x)[:, 5:].all()
        )


def test_bfloat16_is_as_near_as_its_digits():
    arrays, _ = operands(1, 256, 4, 2, 8)
    arrays = tuple(x.astype(jnp.bfloat16) for x in arrays)
    wafer = wk.Wafer.devices(2, 1)

    def attend(q, k, v, sinks, **kind):
        return wk.attention(q, k, v, causal=True, **kind)

    run = functools.partial(attend, implementation="splash", algorithm="allgather", wafer=wafer)
    got = with_gradients(run)(*arrays)
    want = with_gradients(attend)(*(x.astype(jnp.float32) for x in arrays))
    for x, y in zip(got[:4], want[:4], strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(x), y, atol=2**-5, rtol=2**-5)


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("splash", {"bias": jnp.zeros((1, 1))}, "cannot serve: a bias"),
        ("splash", {"precision": "highest"}, "cannot serve: it cannot be told a precision"),
        ("splash", {"wafer": wk.Wafer.devices(4, 1)}, "a tile has 64 rows, fewer than 128"),
        ("splash", {"wafer": wk.Wafer.virtual(wk.WSE2, 2, 2)}, "PEs of a virtual wafer share a"),
        ("cudnn", {}, "it is a kernel for GPUs, and this is a cpu"),
        ("flash", {}, "implementation='flash' is not one of 'auto', 'xla', 'splash', 'cudnn'"),
    ],
)
def test_refuses_an_implementation_that_cannot_serve(asked, options, message):
    (q, k, v, *_), _ = operands(1, 256, 4, 2, 8)
    for call in (wk.attention, wk.attention.explain):
        with pytest.raises(ValueError, match=f"^attention: .*{message}"):
            call(q, k, v, implementation=asked, **options)


def test_explain_says_what_computes_the_tiles():
    x = jax.ShapeDtypeStruct((1, 512, 4, 8), jnp.float32)
    wafer = wk.Wafer.devices(2, 2)
    explained = wk.attention.explain(x, x, x, causal=True, wafer=wafer, implementation="splash")
    assert explained.detail == "tiles by splash attention: asked for"
    assert explained.detail in str(explained)
    on_cpus = wk.attention.explain(x, x, x, wafer=wafer).detail
    assert on_cpus == "tiles by blocked jnp: no other kernel is for a CPU"
