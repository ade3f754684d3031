"""Decoding against the cache: equal to attention over all tokens so far, step by step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

H, STEPS = 4, 6
SINKS = jnp.linspace(-1, 2, 8)
# Options of the cache, and of the attention to it.
KINDS = {
    "all tokens": ({"capacity": 13}, {}),
    "window, sinks, soft cap": (
        {"capacity": 13, "window": 5, "kv_heads": 1},
        {"sinks": SINKS, "soft_cap": 2.0, "scale": 0.7},
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
# Prompts of three sequences, then which of them grow at each step.
PROMPTS = np.array([7, 0, 3], np.int32)
ACTIVE = np.array([[True, step % 2 == 0, step > 2] for step in range(STEPS)])


def cache_of(wafer, **options):
    sizes = {"batch": 3, "capacity": 13, "kv_heads": 2, "heads": 8, "head_size": H}
    return wk.KVCache.empty(**(sizes | options), wafer=wafer)


def tokens(kv_heads, seed=0, dtype=np.float32):
    """q [3, T, 8, H] of the steps, k and v [3, T, K, H] of prompts and steps."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((3, STEPS, 8, H))
    k, v = (rng.standard_normal((3, 7 + STEPS, kv_heads, H)) for _ in range(2))
    return tuple(x.astype(dtype) for x in (q, k, v))


def plain(q, k, v, window=None, scale=None, soft_cap=None, sinks=None):
    """Attention of the last queries `[T, N, H]` to all of `[S, K, H]`; 0 without a token."""
    if not len(k):
        return np.zeros_like(q)
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) * (scale or H**-0.5)
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    query, key = np.ogrid[len(k) - len(q) : len(k), : len(k)]
    sees = (key <= query) & (key > query - (window or len(k)))
    weights = np.exp(scores) * sees
    total = weights.sum(-1) + (0 if sinks is None else np.exp(sinks)[:, None])
    return np.einsum("nts,snh->tnh", weights / total[..., None], v)


@functools.cache
def plain_results(kind):
    """The plain result of each step: sequences without a token have none."""
    options, attends = KINDS[kind]
    q, k, v = tokens(options.get("kv_heads", 2))
    outs, lengths = [], PROMPTS.copy()
    in_cache = [list(range(n)) for n in lengths]  # indices in k and v of a sequence's tokens
    for step in range(STEPS):
        for b in np.flatnonzero(ACTIVE[step]):
            in_cache[b].append(7 + step)
        window = options.get("window")
        outs += [
            [
                plain(q[b, step, None], k[b, i], v[b, i], window, **attends)
                for b, i in enumerate(in_cache)
            ]
        ]
    return np.array(outs)


def steps(cache, **attends):
    """A jitted step that appends to the cache, donated, and attends to it."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, q, k, v, active):
        cache = cache.append(k, v, active=active)
        return cache, wk.decode_attention(q, cache, **attends)

    return run


def decode(cache, q, k, v, **attends):
    """The results of all steps, after the prompts."""
    cache = jax.jit(lambda c, *x: c.fill(*x))(cache, k[:, :7], v[:, :7], PROMPTS)
    run, outs = steps(cache, **attends), []
    for step in range(STEPS):
        at = slice(7 + step, 8 + step)
        cache, out = run(cache, q[:, step : step + 1], k[:, at], v[:, at], ACTIVE[step])
        outs.append(np.asarray(out))
    return np.array(outs), cache


@kinds
def test_every_step_equals_attention_over_all_tokens_so_far(wafer, kind):
    options, attends = KINDS[kind]
    cache = cache_of(wafer, **options)
    outs, cache = decode(cache, *tokens(cache.kv_heads), **attends)
    assert outs.dtype == np.float32
    np.testing.assert_allclose(outs, plain_results(kind), atol=2e-6, rtol=1e-5)
    np.testing.assert_array_equal(cache.lengths, PROMPTS + ACTIVE.sum(0))


@kinds
def test_without_a_wafer(kind):
    options, attends = KINDS[kind]
    cache = cache_of(None, **options)
    outs, _ = decode(cache, *tokens(cache.kv_heads), **attends)
    np.testing.assert_allclose(outs, plain_results(kind), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_16_bits_are_as_near_as_their_digits(dtype):
    cache = cache_of(wk.Wafer.devices(2, 4), dtype=dtype)
    outs, _ = decode(cache, *tokens(2, dtype=dtype))
    assert outs.dtype == dtype
    np.testing.assert_allclose(
        np.float32(outs), plain_results("all tokens"), atol=2**-6, rtol=2**-6
    )


def test_several_tokens_at_once_see_those_before_them(full_wafer):
    """With a window, `chunk` says for how many tokens at once it is kept."""
    q, k, v = tokens(2)
    for window in (None, 4):
        cache = cache_of(full_wafer, window=window, chunk=3)

        @functools.partial(jax.jit, donate_argnums=0)
        def run(cache, q, k, v):
            cache = cache.append(k, v)
            return cache, wk.decode_attention(q, cache)

        for start in range(0, 12, 3):
            at = slice(start, start + 3)
            cache, out = run(cache, q[:, at.start % 6 :][:, :3], k[:, at], v[:, at])
            for b in range(3):
                every = k[b, : at.stop], v[b, : at.stop]
                want = plain(q[b, at.start % 6 :][:3], *every, window)
                np.testing.assert_allclose(out[b], want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4, 8], ids=["MQA", "GQA", "MHA"])
def test_any_heads(kv_heads):
    cache = cache_of(wk.Wafer.devices(2, 4), kv_heads=kv_heads)
    q, k, v = tokens(kv_heads)
    outs, cache = decode(cache, q, k, v)
    assert cache.k.shape[1] == max(kv_heads, 4)  # no PE holds more than it must
    for b, n in enumerate(cache.lengths):
        at = [*range(PROMPTS[b]), *(7 + np.flatnonzero(ACTIVE[:, b]))]
        assert len(at) == n
        want = plain(q[b, -1, None], k[b, at], v[b, at])
        np.testing.assert_allclose(outs[-1, b], want, atol=2e-6, rtol=1e-5)


def test_large_scores_do_not_overflow():
    cache = cache_of(wk.Wafer.devices(2, 2))
    q, k, v = tokens(2)
    outs, _ = decode(cache, 100 * q, 100 * k, v)
    assert np.isfinite(outs).all()


def test_two_sums_along_y_and_nothing_gathered():
    cache = cache_of(wk.Wafer.devices(4, 2))
    q, k, v = tokens(2)
    run = steps(cache)
    program = run.lower(cache, q[:, :1], k[:, :1], v[:, :1], ACTIVE[0]).as_text()
    assert program.count("stablehlo.collective_permute") == 1
    assert program.count('"stablehlo.all_reduce"') == 2
    assert "all_gather" not in program and "all_to_all" not in program


def layers(caches, q, k, v):
    """A step of several layers, unrolled."""
    nexts = []
    for cache in caches:
        cache = cache.append(k, v)
        nexts.append(cache)
        q = q + wk.decode_attention(q, cache)
    return nexts, q


def five_steps(caches, q, k, v):
    """Five such steps in a loop."""
    return jax.lax.fori_loop(0, 5, lambda _, now: layers(now[0], now[1], k, v), (caches, q))


@pytest.mark.parametrize("program", [layers, five_steps])
@pytest.mark.parametrize("batch", [1, 2], ids=["one sequence", "two sequences"])
@pytest.mark.parametrize("grid", [None, "1x4", "2x4", "2of2x2"])
def test_no_cache_is_copied(wafer_called, grid, batch, program, as_shipped):
    """A step holds scores and the new entries beside the caches, which it updates in place."""
    wafer = wafer_called(grid) if grid else None
    sizes = {"batch": batch, "capacity": 2048, "kv_heads": 4, "heads": 8, "head_size": 64}
    caches = [wk.KVCache.empty(**sizes, wafer=wafer) for _ in range(2)]
    q, k = (jnp.zeros((batch, 1, heads, 64)) for heads in (8, 4))
    lowered = jax.jit(program, donate_argnums=0).lower(caches, q, k, k)
    memory = lowered.compile(compiler_options=as_shipped).memory_analysis()
    assert memory is not None
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(caches))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < 0.05 * held


@pytest.mark.parametrize("wafer", [None, wk.Wafer.devices(2, 2)], ids=["local", "wafer"])
def test_both_products_have_the_precision_asked_for(wafer):
    cache, q = cache_of(wafer), tokens(2)[0][:, :1]
    for precision, stated in (("highest", "HIGHEST"), (None, "DEFAULT")):
        run = jax.jit(functools.partial(wk.decode_attention, precision=precision))
        products = re.findall(r"stablehlo.dot_general.*", run.lower(q, cache).as_text())
        assert len(products) == 2
        assert all(f"precision = [{stated}, {stated}]" in p for p in products)


def test_runs_where_the_cache_lives():
    q, k, v = tokens(2)
    with wk.Wafer.virtual(wk.WSE2, 2, 2):
        cache = cache_of(None)
    assert cache.balance.rows == 2
    outs, _ = decode(cache, q, k, v)
    np.testing.assert_allclose(outs, plain_results("all tokens"), atol=2e-6, rtol=1e-5)


def test_before_the_first_token_the_result_is_0():
    cache = cache_of(wk.Wafer.devices(2, 2))
    q, k, v = map(jnp.asarray, tokens(2))
    cache = cache.append(k[:, :1], v[:, :1], active=jnp.array([True, True, False]))
    out = np.asarray(wk.decode_attention(q[:, :3], cache))
    assert not out[:2, :2].any() and not out[2].any()
    want = np.repeat(v[:2, 0], 4, axis=1)  # of a single token, its own value
    np.testing.assert_allclose(out[:2, 2], want, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("grid", [None, "2x2", "virtual-4x4"])
def test_what_is_not_finite_reaches_only_those_who_see_it(wafer_called, grid, bad):
    """A slot that is left over, another sequence's, and a token that left the window do no harm."""
    wafer = None if grid is None else wafer_called(grid)
    q, k, v = map(jnp.asarray, tokens(2))
    k, v, q = k[:, :7], v[:, :7], q[:, :1]
    attend = jax.jit(wk.decode_attention)
    fill = jax.jit(lambda cache, k, v, n: cache.fill(k, v, n))
    for spoiled_k, spoiled_v in ((k * bad, v), (k, v * bad)):
        cache = fill(cache_of(wafer), spoiled_k, spoiled_v, jnp.array([7, 7, 7]))
        assert not np.isfinite(attend(q, cache)).any()
        cache = fill(cache, k, v, jnp.array([3, 0, 5]))
        fresh = fill(cache_of(wafer), k, v, jnp.array([3, 0, 5]))
        np.testing.assert_array_equal(attend(q, cache), attend(q, fresh))
    one = v.at[1].set(bad)
    out = np.asarray(attend(q, fill(cache_of(wafer), k, one, jnp.array([7, 7, 7]))))
    assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1]).all()
    # The oldest token is not finite, and outside the window of three.
    first = v.at[:, 0].set(bad)
    cache = fill(cache_of(wafer, window=3, chunk=2), k[:, :2], first[:, :2], jnp.array([2, 2, 2]))
    append = jax.jit(lambda cache, k, v: cache.append(k, v))
    for t in range(2, 7):
        cache = append(cache, k[:, t : t + 1], first[:, t : t + 1])
        assert np.isfinite(attend(q, cache)).all() == (t >= 3)
    # Two at once: the older one does not see the newer one.
    cache = append(cache, k[:, :2], v[:, :2].at[:, 1].set(bad))
    out = np.asarray(attend(jnp.concatenate([q, q], 1), cache))
    assert np.isfinite(out[:, 0]).all() and np.isnan(out[:, 1]).all()


def test_has_no_gradient():
    cache = cache_of(None)
    q, k, v = tokens(2)
    with pytest.raises(ValueError, match="has no gradient; train with wsekern.attention"):
        jax.grad(lambda q: wk.decode_attention(q, cache).sum())(q[:, :1])


@pytest.mark.refuses
@pytest.mark.parametrize("wafer", [None, wk.Wafer.virtual(wk.WSE2, 2, 2)], ids=["local", "wafer"])
@pytest.mark.parametrize(
    ("q", "options", "message"),
    [
        ((1, 8, H), {}, r"q is \(1, 8, 4\), it must have four dimensions"),
        ((2, 1, 8, H), {}, "it has 2 sequences, the cache 3"),
        ((3, 1, 8, 5), {}, "it has 5 features a head, the cache 4"),
        ((3, 1, 7, H), {}, r"its heads \(7\) must be a multiple of the 2 of the cache"),
        ((3, 2, 8, H), {}, "q has 2 tokens, the cache keeps a window for 1 at once; make it with"),
        ((3, 1, 8, H), {"soft_cap": 0.0}, "soft_cap is 0.0, it must be positive"),
        (
            (3, 1, 8, H),
            {"sinks": jnp.ones(2)},
            r"sinks is \(2,\), it must be one for each of the 8",
        ),
    ],
)
def test_refuses_what_does_not_fit(wafer, q, options, message):
    cache = cache_of(wafer, window=4)
    with pytest.raises(ValueError, match=f"^decode_attention: .*{message}"):
        wk.decode_attention(jnp.ones(q), cache, **options)


@pytest.mark.refuses
def test_refuses_another_dtype():
    with pytest.raises(ValueError, match="q is bfloat16, the cache is float32: cast one of them"):
        wk.decode_attention(jnp.ones((3, 1, 8, H), jnp.bfloat16), cache_of(None))
