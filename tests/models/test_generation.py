"""Generation with a cache against a pass over the whole text for each token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

import wsekern as wk
from models import generation
from models.config import DecoderConfig
from models.decoder import Decoder
from models.generation import generate, stream
from models.presets import find_preset
from models.sampling import Sampling, choose, sequence_keys
from sharding.explain import explain_state
from sharding.state import initialize, logical

SMALL = DecoderConfig(
    vocab=11, d_model=16, d_ff=24, layers=2, heads=4, kv_heads=2, context=8, tied=True
)
LONG = dataclasses.replace(SMALL, context=64, windows=(5, None), stacked=False)


def tokens(batch=2, length=8):
    return jax.random.randint(jax.random.key(1), (batch, length), 0, SMALL.vocab)


@pytest.fixture(scope="module")
def likeliest():
    """A model, and its greedy continuation of `tokens(2, 3)`, made without a cache."""
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    run = jax.jit(lambda t: model(t))
    text = np.asarray(tokens(2, 3))
    for _ in range(7):  # beyond the context of 8: the window slides
        logits = np.asarray(run(text[:, -8:]))
        text = np.concatenate([text, logits[:, -1:].argmax(-1)], axis=1, dtype=np.int32)
    return model, text


def test_greedy_generation_takes_the_likeliest_token_each_time(full_wafer, likeliest):
    model, text = likeliest
    with full_wafer:
        got = generate(model, tokens(2, 3), max_new_tokens=7)
    np.testing.assert_array_equal(got, text)


def test_on_a_mesh_with_explicit_axes(likeliest):
    """In a wafer of it, and without one: the model's arrays say enough."""
    _, text = likeliest
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    wafer = wk.Wafer.of(mesh, y="a", x="b")
    make = lambda: Decoder(SMALL, rngs=nnx.Rngs(0))  # noqa: E731
    with wafer:
        model = logical(initialize(make, wafer))
        inside = generate(model, tokens(2, 3), max_new_tokens=7)
        (step, *_) = stream(model, tokens(2, 3), Sampling(), 2)
    with jax.set_mesh(mesh):
        outside = generate(model, tokens(2, 3), max_new_tokens=4, key=jax.random.key(0))
        assert jax.sharding.get_mesh() == mesh
    np.testing.assert_array_equal(inside, text)
    np.testing.assert_array_equal(outside, text[:, :7])
    np.testing.assert_array_equal(step.tokens, text[:, 3])


@pytest.fixture(scope="module")
def alone():
    """A model, prompts of different lengths, and how each is continued alone."""
    model = Decoder(LONG, rngs=nnx.Rngs(3))
    prompts, lengths = np.asarray(tokens(3, 17)), np.array([17, 1, 9], np.int32)
    texts = [
        np.asarray(generate(model, prompts[row : row + 1, :length], max_new_tokens=12)[0])
        for row, length in enumerate(lengths)
    ]
    return model, prompts, lengths, texts


def test_prompts_of_different_lengths_are_continued_as_if_alone(full_wafer, alone):
    """Through layers with and without a window that is shorter than the prompts."""
    model, prompts, lengths, texts = alone
    with full_wafer:
        got = generate(model, prompts, max_new_tokens=12, lengths=lengths)
    for row, want in zip(got, texts, strict=True):
        np.testing.assert_array_equal(row[: len(want)], want)
        assert not row[len(want) :].any()


def test_a_step_gives_the_models_own_log_probability_and_stop_ends_the_text():
    model = Decoder(LONG, rngs=nnx.Rngs(3))
    lengths = np.array([5, 5], np.int32)
    how = Sampling(temperature=0.7, top_k=4)
    options: dict[str, Any] = {"key": jax.random.key(2), "lengths": lengths}
    steps = list(stream(model, tokens(2, 5), how, 9, **options))
    text = jnp.concatenate([tokens(2, 5), np.stack([s.tokens for s in steps], 1)], axis=1)
    want = np.asarray(jax.nn.log_softmax(jax.jit(lambda t: model(t))(text)))
    for i, step in enumerate(steps):
        picked = np.take_along_axis(want[:, 4 + i], step.tokens[:, None], 1)[:, 0]
        np.testing.assert_allclose(step.logprobs, picked, atol=1e-5)

    end = int(steps[2].tokens[0])
    stopped = list(stream(model, tokens(2, 5), how, 9, stop=(end,), **options))
    first = [next((i for i, s in enumerate(steps) if s.tokens[row] == end), 8) for row in (0, 1)]
    assert len(stopped) == max(first) + 1
    for i, step in enumerate(stopped):
        np.testing.assert_array_equal(step.ended, [i >= f and f < 8 for f in first])
    text = generate(
        model,
        tokens(2, 5),
        max_new_tokens=9,
        temperature=0.7,
        top_k=4,
        stop=(end,),
        key=options["key"],
    )
    assert text.shape == (2, 14) and not text[0, 5 + first[0] + 1 :].any()


@pytest.fixture(scope="module")
def beyond():
    """A model, and how each of three prompts goes on by 12 tokens, to twice the context and more.

    Written token by token, without a cache: the model sees the last 8 tokens of a text.
    """
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    run = jax.jit(lambda t: model(t))
    prompts, lengths = np.asarray(tokens(3, 8)), np.array([8, 1, 5], np.int32)
    how = Sampling(temperature=0.9, top_k=5)
    texts = []
    for row, length in enumerate(lengths):
        text = prompts[row, :length].tolist()
        for _ in range(12):
            seen = np.zeros((1, 8), np.int32)
            seen[0, : len(text[-8:])] = text[-8:]
            logits = run(seen)[:, len(text[-8:]) - 1]
            keys = sequence_keys(jax.random.key(5), jnp.full(row + 1, len(text)))[row:]
            text.append(int(choose(logits, keys, how)[0]))
        texts.append(text)
    return model, prompts, lengths, texts


@pytest.mark.parametrize("new", [0, 3, 12])
def test_prompts_of_different_lengths_go_on_beyond_the_context(beyond, new):
    model, prompts, lengths, texts = beyond
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 5, "key": jax.random.key(5)}
    got = generate(model, prompts, max_new_tokens=new, lengths=lengths, **options)
    assert got.shape == (3, 8 + new)
    for row, text, length in zip(np.asarray(got), texts, lengths, strict=True):
        np.testing.assert_array_equal(row[: length + new], text[: length + new])
        assert not row[length + new :].any()


def test_stop_ends_each_text_beyond_the_context_too(full_wafer, beyond):
    model, prompts, lengths, texts = beyond
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 5, "key": jax.random.key(5)}
    stop = (texts[0][8 + 4], texts[1][1 + 9])  # one ends after the context, one long after it
    with full_wafer:
        got = generate(model, prompts, max_new_tokens=12, lengths=lengths, stop=stop, **options)
    for row, text, length in zip(np.asarray(got), texts, lengths, strict=True):
        ends = [i for i in range(length, len(text)) if text[i] in stop]
        end = ends[0] + 1 if ends else len(text)
        np.testing.assert_array_equal(row[:end], text[:end])
        assert not row[end:].any()


def test_a_text_grows_without_compiling_again():
    model = Decoder(dataclasses.replace(LONG, d_ff=20), rngs=nnx.Rngs(3))
    programs: list[Any] = [generation.prefill, generation.decode]
    before = [program._cache_size() for program in programs]
    for length in (3, 9, 16):
        generate(model, tokens(1, length), max_new_tokens=31 - length)
    after = [program._cache_size() for program in programs]
    assert np.subtract(after, before).tolist() == [1, 1]


def test_sampling_is_a_function_of_its_key_and_keeps_to_top_k():
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    sample = lambda seed, top_k=None: generate(  # noqa: E731
        model,
        tokens(1, 2),
        max_new_tokens=6,
        temperature=1.5,
        top_k=top_k,
        key=jax.random.key(seed),
    )
    np.testing.assert_array_equal(sample(1), sample(1))
    assert any((sample(1) != sample(seed)).any() for seed in (2, 3))
    np.testing.assert_array_equal(sample(1, 1), generate(model, tokens(1, 2), max_new_tokens=6))


def test_top_p_draws_from_the_smallest_set_that_has_the_share():
    """With shares 0.5, 0.3, 0.15, 0.05 and top_p=0.7, the first two are drawn, in their ratio."""
    logits = jnp.log(jnp.array([0.15, 0.5, 0.05, 0.3]))
    keys = jax.random.split(jax.random.key(0), 4000)
    how = Sampling(temperature=1.0, top_p=0.7)
    drawn = jax.jit(lambda k: choose(jnp.tile(logits, (4000, 1)), k, how))(keys)
    counts = np.bincount(drawn, minlength=4)
    assert counts[0] == counts[2] == 0
    assert abs(counts[1] / 4000 - 0.5 / 0.8) < 0.04


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1.0}, "pass key="),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan must be 0 or more"),
        ({"top_k": 12}, "top_k=12 must lie between 1 and the vocabulary, 11"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be 0 or more"),
        ({"lengths": [2, 2]}, r"lengths=\[2, 2\] must be from 1 to 2, one for each of 1"),
        ({"lengths": [0]}, r"lengths=\[0\] must be from 1 to 2"),
        ({"tokens": (1, 9)}, "a prompt of 9 tokens is beyond the model's context of 8"),
    ],
)
def test_refuses(options, message):
    model = Decoder(SMALL, rngs=nnx.Rngs(0))
    options = {"max_new_tokens": 5} | options
    with pytest.raises(ValueError, match=message):
        generate(model, tokens(*options.pop("tokens", (1, 2))), **options)


def shapes_of(config):
    graph, params = nnx.split(Decoder.shapes(config, dtype=jnp.bfloat16))
    return graph, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), params)


@pytest.mark.parametrize(("height", "width"), [(2, 4), (16, 16)])
@pytest.mark.parametrize("name", ["llama3.3-70b", "qwen3-235b-a22b", "gpt-oss-120b"])
def test_large_models_decode_on_an_abstract_wafer(name, height, width):
    """Shapes alone: the bytes of all weights on each device, and four layers read and decode.

    The other layers repeat these four: no model has more than two kinds in turn.
    """
    whole = dataclasses.replace(find_preset(name), stacked=False)
    wafer = wk.Wafer.abstract(wk.WSE3, height, width)
    _, params = shapes_of(whole)
    bytes_per_device = sum(row.bytes_per_device for row in explain_state(params, wafer))
    parts = 2 * sum(leaf.size for leaf in jax.tree.leaves(params)) / (height * width)
    assert parts <= bytes_per_device < 1.01 * parts

    windows, sparse = whole.windows[:4], whole.sparse_layers[:4]
    config = dataclasses.replace(whole, layers=4, windows=windows, sparse_layers=sparse)
    assert set(config.kinds) == set(whole.kinds)
    graph, params = shapes_of(config)
    operands = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 1024), (8,))]
    key, ends, how = jax.random.key(0), jnp.zeros(0, jnp.int32), Sampling()

    def text(params, tokens, lengths):
        state, _ = generation.prefill(graph, params, tokens, lengths, key, ends, how, 2048, wafer)
        return generation.decode(graph, params, state, key, ends, how, wafer)

    with wafer:
        state, (new, _, _) = jax.eval_shape(text, params, *operands)
    assert new.shape == (8,) and len(state.caches) == config.layers
