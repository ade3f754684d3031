"""The decoders that ours is timed against compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import plain_decoder
from benchmarks.flax_decoder import FlaxDecoder
from models.decoder import Decoder
from models.families.llama import NANO
from training.step import mean_loss

CONFIG = dataclasses.replace(NANO, d_model=32, d_ff=48, kv_heads=2, layers=2, context=16, vocab=64)
TOKENS, TARGETS = np.random.default_rng(0).integers(0, 64, (2, 2, 16)).astype(np.int32)


@pytest.fixture(scope="module")
def ours():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def losses_and_gradients(loss, params):
    return jax.jit(jax.value_and_grad(loss))(params)


def test_the_plain_decoder_has_the_same_loss_and_gradient(ours):
    graph, params = nnx.split(ours)
    want = losses_and_gradients(lambda p: mean_loss(graph, p, TOKENS, TARGETS), params)
    got = losses_and_gradients(
        lambda p: plain_decoder.loss(p, TOKENS, TARGETS, CONFIG, lambda x, _: x), params
    )
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_flax_decoder_has_the_same_logits(ours):
    peer = FlaxDecoder(CONFIG, rngs=nnx.Rngs(1), dtype=jnp.float32)
    assert size(peer) == size(ours)
    peer.embedding.embedding[...] = ours.embedding[...]
    peer.norm.scale[...] = ours.norm.scale[...]
    for i, block in enumerate(peer.blocks):
        attention, feed_forward = (
            ours.stages[0].blocks[0].attention,
            ours.stages[0].blocks[0].feed_forward,
        )
        for name in ("query", "key", "value", "out"):
            getattr(block, name).kernel[...] = getattr(attention, name).weight[i]
        for name in ("gate", "up", "down"):
            getattr(block, name).kernel[...] = getattr(feed_forward, name).weight[i]
    np.testing.assert_allclose(logits(peer), logits(ours), atol=1e-5)


def size(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))


def logits(model):
    graph, params = nnx.split(model)
    return jax.jit(lambda p: nnx.merge(graph, p)(TOKENS))(params)
