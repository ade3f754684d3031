"""What the TPU's compiler makes of attention and decoding; nothing runs."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

import wsekern as wk
from wsekern.kernels.attention.kv_cache import NEW, SLOTS

pytestmark = pytest.mark.tpu
HEADS = P("wafer", "y", "x", None)


@pytest.fixture(scope="module")
def chips():
    return wk.Wafer.topology("v5e:2x2")


def shapes(sharding, rows=1024):
    return [
        jax.ShapeDtypeStruct((1, rows, n, 128), jnp.bfloat16, sharding=sharding) for n in (8, 4, 4)
    ]


def kernels(function, *operands):
    """How many Pallas kernels a compiled program calls, and its temporaries in bytes."""
    compiled = jax.jit(function).lower(*operands).compile()
    calls = (compiled.as_text() or "").count('custom_call_target="tpu_custom_call"')
    memory = compiled.memory_analysis()
    assert memory is not None
    return calls, memory.temp_size_in_bytes


def with_gradients(run):
    def call(dout, *operands):
        out, pullback = jax.vjp(run, *operands)
        return out, *pullback(dout)

    return call


@pytest.mark.parametrize(
    ("algorithm", "options", "expected"),
    [
        # For each of two groups of heads one kernel, and with a window two for the gradients.
        ("allgather", {"causal": True, "window": 300}, 2 * 3),
        pytest.param("ulysses", {"soft_cap": 30.0}, 2, marks=pytest.mark.slow),
        pytest.param("ring", {"causal": True}, 5 * 2, marks=pytest.mark.slow),  # five tiles
    ],
)
def test_every_tile_is_splash_attentions(chips, algorithm, options, expected):
    run = functools.partial(wk.attention, algorithm=algorithm, wafer=chips, **options)
    operands = shapes(chips.sharding(HEADS))
    calls, temporaries = kernels(with_gradients(run), operands[0], *operands)
    assert calls == expected and temporaries < 16 * 2**20


def test_every_chip_has_the_same_work_and_waits_for_no_gather(chips):
    """Of 8 x 8 blocks of 1024 rows and keys, the exchanged rows of a chip see 18 of its 32."""
    run = functools.partial(wk.attention, causal=True, algorithm="allgather")
    operands = shapes(chips.sharding(HEADS), rows=8192)
    c = wk.compile(with_gradients(run), operands[0], *operands, wafer=chips, roofline=False)
    assert c.cost is not None
    assert {key.kind for key in c.cost.sent} == {"collective-permute"}
    assert c.waited_bytes < c.sent_bytes / 2
    seen = 4 * 18 * 1024 * 1024  # heads of queries, blocks, scores of each
    flops = (2 + 5) * 2 * seen * 128
    assert c.cost.kernel_seconds == pytest.approx(flops / c.chip.bfloat16_flops)


def test_a_program_on_one_chip_that_is_not_there_has_its_kernel_too(chips):
    """The operands' types do not name the platform: only lowering knows it."""
    run = functools.partial(wk.attention, causal=True)
    operands = shapes(SingleDeviceSharding(chips.device_mesh.devices.flat[0]))
    calls, temporaries = kernels(run, *operands)
    assert calls == 1 and temporaries < 2 * 2**20
    assert kernels(with_gradients(run), operands[0], *operands)[0] == 2


def test_explain_knows_the_chips(chips):
    explained = wk.attention.explain(*shapes(None), causal=True, wafer=chips)
    assert explained.detail == "tiles by splash attention: on a TPU"
    few = wk.attention.explain(*shapes(None, rows=64), causal=True, wafer=chips)
    assert few.detail.endswith(
        "splash attention does not serve: a tile has 32 rows, fewer than 128"
    )


@pytest.mark.parametrize("kv_heads", [2, 8])
def test_a_step_of_decoding_copies_no_cache(chips, kv_heads):
    empty = functools.partial(
        wk.KVCache.empty, batch=8, capacity=4096, kv_heads=kv_heads, heads=8, head_size=128
    )
    cache = jax.eval_shape(functools.partial(empty, dtype=jnp.bfloat16, wafer=chips))

    def placed(leaf):
        spec = SLOTS if leaf.ndim == 4 else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=chips.sharding(spec))

    def step(cache, q, k):
        cache = cache.append(k, k)
        return wk.decode_attention(q, cache), cache

    q, k = (
        jax.ShapeDtypeStruct((8, 1, n, 128), jnp.bfloat16, sharding=chips.sharding(NEW))
        for n in (8, kv_heads)
    )
    cache = jax.tree.map(placed, cache)
    program = jax.jit(step, donate_argnums=0).lower(cache, q, k).compile().as_text() or ""
    slots = f"[8,{kv_heads // 2},2048,128]"
    assert slots in program and not [x for x in program.splitlines() if f"{slots}{{3,1" in x]
