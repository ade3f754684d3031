"""Attention over pages: equal to plain attention, whoever owns which page, on every grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

S, H, LENGTHS = 4, 4, (9, 1, 6)
TABLES = np.array([[5, 0, 3], [2, 0, 0], [4, 1, 0]], np.int32)


def plain(q, k, v, window):
    """Attention of the last query `[N, H]` to all keys `[S, K, H]`."""
    k, v = (np.repeat(x, q.shape[0] // x.shape[1], 1)[-(window or len(x)) :] for x in (k, v))
    scores = np.einsum("nh,snh->ns", q, k) * H**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("ns,snh->nh", weights / weights.sum(-1, keepdims=True), v)


def check(wafer, window=None, dtype=np.float32):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((3, 9, 2, H)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((3, 1, 8, H)).astype(np.float32)
    cache = wk.KVPages.empty(
        layers=2,
        pages=6,
        page_tokens=S,
        kv_heads=2,
        heads=8,
        head_size=H,
        dtype=dtype,
        wafer=wafer,
    )
    assert cache.k.dtype == dtype
    lengths = np.array(LENGTHS)
    positions = np.where(np.arange(9) < lengths[:, None], np.arange(9), -1).astype(np.int32)

    @jax.jit
    def run(cache, q, k, v):
        cache = cache.write(1, k, v, jnp.asarray(TABLES), jnp.asarray(positions))
        last = jnp.asarray(lengths[:, None] - 1, jnp.int32)
        return wk.paged_attention(q, cache, 1, jnp.asarray(TABLES), last, window=window)

    out = np.asarray(run(cache, q, k, v))
    for b, length in enumerate(LENGTHS):
        expected = plain(q[b, 0], k[b, :length], v[b, :length], window)
        rtol, atol = (0.0, 0.03) if dtype == np.int8 else (1e-5, 1e-6)
        np.testing.assert_allclose(out[b, 0], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("window", [None, 3])
def test_on_one_device(window):
    check(None, window)


@pytest.mark.parametrize("grid", [(2, 2), (4, 1), (1, 4), (2, 4)])
def test_on_devices(grid):
    check(wk.Wafer.devices(*grid))


def test_on_virtual_pes():
    check(wk.Wafer.virtual(wk.WSE2, height=2, width=2), window=3)


@pytest.mark.parametrize("grid", ["one", "devices", "virtual"])
def test_in_eight_bits(grid):
    wafers = {
        "one": lambda: None,
        "devices": lambda: wk.Wafer.devices(2, 2),
        "virtual": lambda: wk.Wafer.virtual(wk.WSE2, height=2, width=2),
    }
    check(wafers[grid](), dtype=np.int8)


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_only_what_sees_a_token_that_is_not_finite_is_not_finite(dtype):
    cache = wk.KVPages.empty(layers=1, pages=2, page_tokens=S, kv_heads=1, head_size=H, dtype=dtype)
    k = np.ones((1, 3, 1, H), np.float32)
    v = k.copy()
    v[0, 1] = np.inf
    tables, positions = jnp.zeros((1, 1), jnp.int32), jnp.arange(3)[None]

    @jax.jit
    def run(cache, k, v):
        cache = cache.write(0, k, v, tables, positions)
        return cache, wk.paged_attention(k, cache, 0, tables, positions)

    cache, out = run(cache, k, v)
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1:]).all()
    _, out = run(cache, k, k)  # the page is used again
    np.testing.assert_allclose(out, 1, rtol=0.01)


def test_refuses_a_dtype_that_is_neither_floating_nor_int8():
    with pytest.raises(ValueError, match="dtype"):
        wk.KVPages.empty(layers=1, pages=2, page_tokens=4, kv_heads=1, head_size=4, dtype=np.int16)


def test_refuses_pages_that_the_rows_do_not_share_evenly():
    with pytest.raises(ValueError, match="page_tokens=3 is not a multiple of the wafer's height"):
        wk.KVPages.empty(
            layers=1, pages=2, page_tokens=3, kv_heads=1, head_size=4, wafer=wk.Wafer.devices(2, 2)
        )
