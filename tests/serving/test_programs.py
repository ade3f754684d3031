import logging

import jax
import jax.numpy as jnp
from flax import nnx

import models
from serving.programs import DeviceSizes, Programs


def test_a_start_compiles_no_program_for_its_empty_cache(caplog):
    config = models.DecoderConfig(
        vocab=61, d_model=8, d_ff=16, layers=1, heads=2, kv_heads=1, context=32, stacked=True
    )
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    sizes = DeviceSizes(pages=3, page_tokens=8, slots=2, columns=3, vocab=61)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        programs = Programs(model, sizes, kv_dtype=jnp.float32, wafer=None, folder=None)
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    assert programs.bytes_of_cache == 2 * 3 * 8 * 4 * 4  # keys, values; pages; tokens; head; f32
