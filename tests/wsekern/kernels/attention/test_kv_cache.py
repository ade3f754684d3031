"""The cache: where its entries lie, how it fills, grows and is full, and what it refuses."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import wsekern as wk
from wsekern.kernels.attention.kv_cache import SLOTS

SIZES = {"batch": 3, "capacity": 13, "kv_heads": 2, "head_size": 4}


def cache_of(wafer, **options):
    return wk.KVCache.empty(**(SIZES | options), wafer=wafer)


def tokens_from(starts, tokens):
    """Keys and values of `tokens` tokens from position `starts`; each number is its position."""
    position = np.asarray(starts)[:, None] + np.arange(tokens)
    k = jnp.broadcast_to(position[..., None, None], (*position.shape, 2, 4)).astype(jnp.float32)
    return k, k + 100


def assert_balanced(cache):
    """Each row of PEs has the tokens it should, in the slots they should be in."""
    balance, lengths = cache.balance, np.asarray(cache.lengths)
    first = np.stack([balance.first(jnp.asarray(lengths), r) for r in range(balance.rows + 1)], 1)
    held = np.diff(first)
    assert (held.max(1) - held.min(1) <= 1).all()
    np.testing.assert_array_equal(held.sum(1), np.minimum(lengths, balance.max_tokens))
    for name, add in (("k", 0), ("v", 100)):
        whole = np.asarray(getattr(cache, name))  # the rows of PEs, one behind the other
        rows = whole.reshape(*whole.shape[:2], balance.rows, balance.slots, -1)
        for b in range(len(lengths)):
            for row in range(balance.rows):
                at = np.arange(first[b, row], first[b, row + 1])
                got = rows[b, : cache.kv_heads, row, at % balance.slots]
                assert (got == (at + add)[:, None, None]).all()


append = jax.jit(lambda cache, k, v, active: cache.append(k, v, active=active), donate_argnums=0)


@pytest.mark.parametrize("window", [None, 6, 2])
@pytest.mark.parametrize("grid", ["1x1", "4x1", "2of2x2", "virtual-4x4"])
def test_rows_stay_balanced_token_by_token(wafer_called, grid, window):
    cache = cache_of(wafer_called(grid), window=window)
    for step in range(13):
        active = np.array([True, step % 2 == 0, step > 4])
        cache = append(cache, *tokens_from(cache.lengths, 1), active)
        assert_balanced(cache)
    np.testing.assert_array_equal(cache.lengths, [13, 7, 8])


@pytest.mark.parametrize("window", [None, 5])
def test_prompts_of_any_length_fill_it_balanced(full_wafer, window):
    cache = cache_of(full_wafer, window=window)
    fill = jax.jit(lambda cache, k, v, n: cache.fill(k, v, n), donate_argnums=0)
    for lengths in ([0, 1, 10], [9, 4, 7]):
        cache = fill(cache, *tokens_from([0] * 3, 10), np.array(lengths))
        assert_balanced(cache)
        np.testing.assert_array_equal(cache.lengths, lengths)


def test_fills_some_sequences_and_leaves_others(full_wafer):
    cache = cache_of(full_wafer).fill(*tokens_from([0] * 3, 6))
    assert_balanced(cache)
    others = cache.fill(*tokens_from([0] * 3, 9), active=jnp.array([False, True, False]))
    assert_balanced(others)
    np.testing.assert_array_equal(others.lengths, [6, 9, 6])


@pytest.mark.parametrize("grid", [None, "2x4", "virtual-4x4"])
def test_several_tokens_are_appended_as_one_by_one(wafer_called, grid):
    cache = cache_of(wafer_called(grid) if grid else None)
    for start in (0, 5, 10):
        cache = append(cache, *tokens_from(cache.lengths, 5), np.array([True, start == 0, True]))
        assert_balanced(cache)
    np.testing.assert_array_equal(cache.lengths, [13, 5, 13])  # two had no room


def test_a_prompt_of_a_window_may_be_longer_than_it():
    cache = cache_of(wk.Wafer.devices(2, 2), window=4).fill(*tokens_from([0] * 3, 30))
    assert_balanced(cache)
    assert cache.k.shape[2] == 4  # only the window is kept
    assert not cache.full.any()


def test_a_full_cache_keeps_what_it_has():
    """Where the lengths are traced; where they are not, it refuses."""
    cache = cache_of(wk.Wafer.devices(2, 2)).fill(*tokens_from([0] * 3, 13), jnp.array([13, 12, 3]))
    np.testing.assert_array_equal(cache.full, [True, False, False])
    active = jnp.array([True, True, False])
    with pytest.raises(
        ValueError, match="sequence 0 has 13 tokens, 1 more are beyond the capacity of 13"
    ):
        cache.append(*tokens_from(cache.lengths, 1), active=active)
    cache = append(cache, *tokens_from(cache.lengths, 1), active)
    assert_balanced(cache)
    np.testing.assert_array_equal(cache.lengths, [13, 13, 3])
    cache.append(*tokens_from(cache.lengths, 1), active=jnp.array([False, False, True]))


@pytest.mark.parametrize("batch", [3, 4])
@pytest.mark.parametrize("grid", ["2x4", "2of2x2"])
def test_one_program_serves_every_length(wafer_called, grid, batch, caplog):
    cache = cache_of(wafer_called(grid), batch=batch)
    step = jax.jit(lambda cache, k, v: cache.append(k, v), donate_argnums=0)
    k, v = tokens_from([0] * batch, 1)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(5):
            cache = step(cache, k, v)
    compiled = [r for r in caplog.records if "Compiling jit(<lambda>)" in r.getMessage()]
    assert len(compiled) == 1


def test_an_append_sends_one_entry_to_the_row_above():
    cache = cache_of(wk.Wafer.devices(4, 2))
    k, v = tokens_from([0] * 3, 1)
    program = append.lower(cache, k, v, np.ones(3, bool)).as_text()
    assert program.count("stablehlo.collective_permute") == 1
    upwards = "[[2, 0], [4, 2], [6, 4], [3, 1], [5, 3], [7, 5]]"
    assert f"source_target_pairs = dense<{upwards}>" in program
    for other in ("all_gather", "all_reduce", "all_to_all"):
        assert other not in program


def test_lies_along_the_grid_from_the_first():
    wafer = wk.Wafer.devices(2, 2, 2)
    for cache in (cache_of(wafer), jax.jit(lambda: cache_of(wafer))()):
        assert cache.k.shape == (4, 2, 14, 4)  # sequences and slots padded to the grid
        assert cache.k.sharding.is_equivalent_to(wafer.sharding(SLOTS), 4)
        assert cache.k.addressable_shards[0].data.shape == (2, 1, 7, 4)


@pytest.mark.parametrize("batch", [2, 3], ids=["divides", "padded"])
def test_on_explicit_axes(batch):
    mesh = jax.make_mesh((2, 2, 2), ("d", "a", "b"), axis_types=(AxisType.Explicit,) * 3)
    wafer = wk.Wafer.of(mesh, y="a", x="b", wafer="d")
    q = jax.random.normal(jax.random.key(0), (batch, 1, 6, 4))
    k, v = (x[:, :, :1] for x in tokens_from([0] * batch, 7))
    active = jnp.ones(batch, bool)

    @jax.jit
    def run(cache, k, v):
        cache = cache.fill(k, v).append(k[:, :1], v[:, :1], active=active)
        return cache, wk.decode_attention(q, cache, sinks=jnp.ones(6))

    want = run(cache_of(None, batch=batch, kv_heads=1), k, v)[1]
    with jax.set_mesh(mesh):
        cache, out = run(cache_of(wafer, batch=batch, kv_heads=1), k, v)
    np.testing.assert_allclose(out, want, rtol=1e-5)
    np.testing.assert_array_equal(cache.lengths, [8] * batch)


def test_is_traced_on_an_abstract_wafer():
    wafer = wk.Wafer.abstract(wk.WSE2, 8, 8)

    def step(k):
        cache = cache_of(wafer, kv_heads=8).append(k, k)
        return wk.decode_attention(k, cache)

    k = jax.ShapeDtypeStruct((3, 1, 8, 4), jnp.float32)
    assert "ppermute" in str(jax.make_jaxpr(step)(k))
    assert jax.eval_shape(step, k).shape == k.shape


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch is 0, it must be an integer of 1 or more"),
        ({"capacity": 0}, "capacity is 0, it must"),
        ({"capacity": 2.5}, "capacity is 2.5, it must"),
        ({"window": 0}, "window is 0, it must"),
        ({"chunk": -1}, "chunk is -1, it must"),
        ({"heads": 3}, "heads=3 is not a multiple of kv_heads=2"),
        ({"dtype": jnp.int8}, "dtype is int8, it must be a floating dtype"),
    ],
)
def test_refuses_sizes(sizes, message):
    with pytest.raises(ValueError, match=f"^KVCache.empty: {message}"):
        cache_of(None, **sizes)


@pytest.mark.refuses
@pytest.mark.parametrize("what", ["append", "fill"])
@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ((3, 2, 4), (3, 2, 4), r"k is \(3, 2, 4\), it must have four dimensions"),
        ((2, 1, 2, 4), (2, 1, 2, 4), "it has 2 sequences, the cache 3"),
        ((3, 1, 1, 4), (3, 1, 1, 4), "it has 1 heads, the cache 2"),
        ((3, 1, 2, 4), (3, 1, 2, 5), "v is .*: it has 5 features a head, the cache 4"),
        ((3, 1, 2, 4), (3, 2, 2, 4), "k is .* and v is .*: they must be alike"),
        ((3, 0, 2, 4), (3, 0, 2, 4), "they must be alike, and not empty"),
    ],
)
def test_refuses_tokens_that_do_not_fit(what, k, v, message):
    with pytest.raises(ValueError, match=f"^KVCache.{what}: .*{message}"):
        getattr(cache_of(None), what)(jnp.ones(k), jnp.ones(v))


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": jnp.array([1, 2])}, r"lengths is int32\[2\], it must be integers\[3\]"),
        ({"lengths": jnp.ones(3)}, r"lengths is float32\[3\], it must be integers\[3\]"),
        ({"lengths": jnp.array([1, 2, 6])}, r"lengths\[2\] is 6, it must be from 0 to 5"),
        ({"lengths": jnp.array([1, -1, 5])}, r"lengths\[1\] is -1, it must be from 0 to 5"),
        ({"active": jnp.ones(3)}, r"active is float32\[3\], it must be bool\[3\]"),
        ({"active": jnp.array([True])}, r"active is bool\[1\], it must be bool\[3\]"),
    ],
)
def test_refuses_prompts_that_do_not_fit(options, message):
    k, v = tokens_from([0] * 3, 5)
    with pytest.raises(ValueError, match=f"^KVCache.fill: {message}"):
        cache_of(None).fill(k, v, **options)


@pytest.mark.refuses
def test_refuses_prompts_beyond_the_capacity_and_other_dtypes():
    k, v = tokens_from([0] * 3, 14)
    with pytest.raises(ValueError, match="prompts have 14 tokens, the cache a capacity of 13"):
        cache_of(None).fill(k, v)
    with pytest.raises(ValueError, match="k is float16, the cache is float32: cast it"):
        cache_of(None).append(k[:, :1].astype(jnp.float16), v[:, :1])
