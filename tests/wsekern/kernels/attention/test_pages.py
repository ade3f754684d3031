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


def check(wafer, window=None):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((3, 9, 2, H)).astype(np.float32) for _ in range(2))
    q = rng.standard_normal((3, 1, 8, H)).astype(np.float32)
    cache = wk.KVPages.empty(
        layers=2, pages=6, page_tokens=S, kv_heads=2, heads=8, head_size=H, wafer=wafer
    )
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
        np.testing.assert_allclose(out[b, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 3])
def test_on_one_device(window):
    check(None, window)


@pytest.mark.parametrize("grid", [(2, 2), (4, 1), (1, 4), (2, 4)])
def test_on_devices(grid):
    check(wk.Wafer.devices(*grid))


def test_on_virtual_pes():
    check(wk.Wafer.virtual(wk.WSE2, height=2, width=2), window=3)


def test_refuses_pages_that_the_rows_do_not_share_evenly():
    with pytest.raises(ValueError, match="page_tokens=3 is not a multiple of the wafer's height"):
        wk.KVPages.empty(
            layers=1, pages=2, page_tokens=3, kv_heads=1, head_size=4, wafer=wk.Wafer.devices(2, 2)
        )
