"""The decoder against formulas in NumPy, and on every wafer against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wsekern as wk
from models.config import DecoderConfig
from models.decoder import Decoder

SMALL = DecoderConfig(
    vocab=11, d_model=16, d_ff=24, layers=2, heads=4, kv_heads=2, context=8, tied=True
)
GPT = dataclasses.replace(
    SMALL,
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    biases=("qkv", "out", "mlp", "norm"),
    kv_heads=4,
)
ODD = dataclasses.replace(SMALL, d_model=18, heads=3, kv_heads=3, d_ff=25, tied=False)
CONFIGS = {"llama": SMALL, "gpt2": GPT, "odd": ODD}


def tokens(batch=2, length=8):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, SMALL.vocab)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("llama", "2x4"), ("llama", "2of2x2"), ("llama", "virtual-4x4")]
    + [("gpt2", "2x4"), ("odd", "virtual-4x4")],
)
def test_logits_and_gradients_are_the_same_on_every_wafer(name, grid, wafer_called):
    graph, params = nnx.split(Decoder(CONFIGS[name], rngs=nnx.Rngs(0)))

    def loss(params):
        logits = nnx.merge(graph, params)(tokens())
        return wk.cross_entropy(logits, tokens()).sum(), logits

    grad = jax.jit(jax.grad(loss, has_aux=True))
    want_grads, want = grad(params)
    with wafer_called(grid):
        got_grads, got = grad(params)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_the_decoder_equals_the_formulas_of_the_papers():
    """Against the formulas written out with numpy, layer by layer, in float64."""
    model = Decoder(dataclasses.replace(SMALL, kv_heads=4), rngs=nnx.Rngs(0))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))
    got = jax.jit(lambda t: model(t))(tokens())
    np.testing.assert_allclose(got, _llama(p, np.asarray(tokens()), 4), atol=1e-5)


def _llama(p, tokens, heads):
    x = p["embedding"][tokens]
    B, T, D = x.shape
    for layer in range(p["stages"][0]["blocks"][0]["attention"]["query"]["weight"].shape[0]):
        b = jax.tree.map(lambda w, layer=layer: w[layer], p["stages"][0]["blocks"][0])
        h = _rms(x, b["attention_norm"]["scale"])
        q, k, v = (
            (h @ b["attention"][n]["weight"]).reshape(B, T, heads, -1)
            for n in ("query", "key", "value")
        )
        q, k = _rope(q), _rope(k)
        scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        o = np.einsum("bnts,bsnh->btnh", weights, v).reshape(B, T, D)
        x = x + o @ b["attention"]["out"]["weight"]
        h = _rms(x, b["feed_forward_norm"]["scale"])
        gate = h @ b["feed_forward"]["gate"]["weight"]
        up = h @ b["feed_forward"]["up"]["weight"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ b["feed_forward"]["down"]["weight"]
    return _rms(x, p["norm"]["scale"]) @ p["embedding"].T


def _rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def _rope(x):
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[None, :, None], np.sin(angles)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def test_rematerialization_changes_memory_not_values(as_shipped):
    deep = dataclasses.replace(SMALL, layers=6, context=64)
    inputs = tokens(4, 64)

    def program(remat):
        graph, params = nnx.split(Decoder(deep, rngs=nnx.Rngs(0), remat=remat))
        loss = lambda p: wk.cross_entropy(nnx.merge(graph, p)(inputs), inputs).mean()  # noqa: E731
        lowered = jax.jit(jax.grad(loss)).lower(params)
        return lowered.compile(compiler_options=as_shipped), params

    (plain, params), (saving, _) = program(False), program(True)
    for a, b in zip(*(jax.tree.leaves(f(params)) for f in (plain, saving)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    sizes = [f.memory_analysis().temp_size_in_bytes for f in (plain, saving)]
    assert sizes[1] < 0.7 * sizes[0]


def test_compute_dtype_leaves_parameters_alone():
    model = Decoder(SMALL, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    low = jax.jit(lambda t: model(t))(tokens())
    assert low.dtype == jnp.float32
    model.dtype = jnp.dtype("float32")
    np.testing.assert_allclose(low, jax.jit(lambda t: model(t))(tokens()), atol=0.03)


def test_padding_may_hold_any_number():
    """Its embedding is NaN, and would reach tokens that do not see it: 0 times NaN is NaN."""
    model, real = Decoder(SMALL, rngs=nnx.Rngs(0)), jnp.arange(8)[None] < 5
    run = nnx.jit(lambda model, tokens, mask: model(tokens, mask=mask))
    padded = jnp.where(real, tokens(1), -1)
    got, want = run(model, padded, real), run(model, tokens(1), real)
    np.testing.assert_array_equal(got[:, :5], want[:, :5])
    assert np.isfinite(got).all()
    of_pairs = jnp.tril(jnp.ones((8, 8), bool))[None] & real[:, None, :]
    np.testing.assert_allclose(run(model, tokens(1), of_pairs)[:, :5], want[:, :5], atol=1e-5)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="9 tokens, the model's context is 8"):
        Decoder(SMALL, rngs=nnx.Rngs(0))(tokens(1, 9))
