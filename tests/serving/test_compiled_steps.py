"""What the TPU's compiler makes of a serving step on 16 chips; nothing runs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import models
import wsekern as wk
from models.config import DecoderConfig
from serving.batches import empty_batch
from serving.programs import DeviceSizes, Shape, empty_rows
from serving.sampler import Extras, Rows, no_extras
from serving.steps import Batch, State, run_step
from sharding.state import unpadded_sharding
from wsekern.kernels.attention.pages import KEYS, SCALES, VALUES

pytestmark = pytest.mark.tpu
CONFIG = DecoderConfig(
    vocab=4096, d_model=512, d_ff=1024, layers=4, heads=8, kv_heads=4, context=1024, tied=True
)
PAGES, PAGE_TOKENS = 4096, 32


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape(16, 1), jnp.int8),
        (Shape(1, 32), jnp.bfloat16),
        pytest.param(Shape(2, 8, every=True), jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_step_fits_sixteen_chips_and_copies_no_cache(shape, dtype):
    wafer = wk.Wafer.topology("v5e:4x4")
    whole = wafer.sharding(P())

    def like(leaf, sharding=whole) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    graph, params = nnx.split(models.Decoder.shapes(CONFIG, dtype=jnp.bfloat16))
    params = jax.tree.map(
        lambda v: v.replace(like(v.get_value(), unpadded_sharding(v, wafer))),
        params,
        is_leaf=lambda v: isinstance(v, nnx.Variable),
    )
    make = functools.partial(
        wk.KVPages.empty,
        layers=CONFIG.layers,
        pages=PAGES,
        page_tokens=PAGE_TOKENS,
        kv_heads=CONFIG.kv_heads,
        heads=CONFIG.heads,
        head_size=CONFIG.d_head,
        dtype=dtype,
    )
    with wafer:
        cache = jax.eval_shape(make)
        specs = (KEYS, VALUES, SCALES, SCALES)
        pages = [
            like(x, wafer.sharding(spec)) for x, spec in zip(cache.arrays, specs, strict=False)
        ]
        cache = cache.with_arrays(tuple(pages))
        slots, counts = (like(np.zeros(of, np.int32)) for of in ((17,), (17, CONFIG.vocab)))
        sizes = DeviceSizes(PAGES, PAGE_TOKENS, slots=16, columns=32, vocab=CONFIG.vocab)
        batch = Batch(*map(like, empty_batch(shape, sizes)))
        rows = Rows(*map(like, empty_rows(shape.rows, CONFIG.vocab)))
        extras = Extras(*map(like, no_extras(shape.rows, CONFIG.vocab)))

        def step(params, state, batch, rows, extras):
            model = nnx.merge(graph, params)
            return run_step(
                model,
                state,
                batch,
                rows,
                extras,
                every=shape.every,
                vocab=CONFIG.vocab,
                least_rows=1,
            )

        jitted = jax.jit(step, donate_argnums=1)
        compiled = jitted.lower(params, State(cache, slots, counts), batch, rows, extras).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    own = sum(x.size * x.dtype.itemsize for x in pages) / wafer.size
    assert memory.alias_size_in_bytes >= own  # updated in place
    assert memory.temp_size_in_bytes < own
