"""The engine: each request gets the text that it would get alone, and gives back what it took."""

import asyncio
import dataclasses
import threading

import jax
import numpy as np
import pytest
from flax import nnx

import models
import wsekern as wk
from models.config import DecoderConfig
from serving import equality, launcher
from serving.engine import Engine
from serving.request import PromptTooLong, SamplingParams

NEW = 12
CONFIG = DecoderConfig(
    vocab=256,
    d_model=64,
    d_ff=128,
    layers=2,
    heads=4,
    kv_heads=2,
    context=128,
    tied=True,
    windows=(None, 16),
)
GREEDY = SamplingParams(max_tokens=NEW)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def engine(model, folder):
    with Engine(model, max_streams=4, page_tokens=8, folder=folder) as engine:
        yield engine


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (1, 3, 8, 9, 33, 50, 100)]


@pytest.fixture(scope="module")
def alone(engine, prompts):
    return [engine.generate([prompt], GREEDY)[0].tokens for prompt in prompts]


def is_empty(engine):
    engine.generate([[1]], SamplingParams(max_tokens=1))  # the snapshot is as new as this
    shown = engine.snapshot()
    for _ in range(100):
        if not shown.slots and not shown.waiting and not shown.pages_held:
            return shown.pages_free + shown.pages_evictable == shown.pages_total
        threading.Event().wait(0.05)
        shown = engine.snapshot()
    return False


def test_a_text_is_that_of_generate(model, prompts, alone):
    assert len(alone) == len(prompts)
    for prompt, tokens in zip(prompts[:5], alone, strict=False):
        whole = models.generate(model, np.array([prompt]), max_new_tokens=NEW)
        assert np.asarray(whole)[0, len(prompt) :].tolist() == list(tokens)


def test_a_text_is_the_same_among_others(engine, prompts, alone):
    assert engine.is_exact
    assert [c.tokens for c in engine.generate(prompts, GREEDY)] == alone
    assert is_empty(engine)


def test_one_stream_decodes_where_few_rows_are_unequal(model, prompts, alone, monkeypatch):
    monkeypatch.setattr(equality, "_ROWS", (32,))
    with Engine(model, max_streams=1, page_tokens=8) as engine:
        assert [c.tokens for c in engine.generate(prompts[:3], GREEDY)] == alone[:3]


def test_a_sampled_text_is_the_same_among_others(engine, prompts):
    params = SamplingParams(max_tokens=NEW, temperature=1.0, top_p=0.9, min_p=0.01, seed=5)
    each = [engine.generate([prompt], params)[0].tokens for prompt in prompts]
    assert [c.tokens for c in engine.generate(prompts, params)] == each


def test_penalties_and_biases_change_the_text(engine, prompts, alone):
    params = SamplingParams(max_tokens=NEW, presence_penalty=2.0, logit_bias={7: 100.0})
    (completion,) = engine.generate(prompts[:1], params)
    assert completion.tokens[0] == 7
    (banned,) = engine.generate(
        prompts[:1], SamplingParams(max_tokens=NEW, logit_bias={alone[0][0]: -100.0})
    )
    assert alone[0][0] not in banned.tokens


def test_stop_tokens_end_a_text_but_not_before_min_tokens(engine, prompts, alone):
    stop = (alone[4][2],)
    (completion,) = engine.generate(prompts[4:5], SamplingParams(max_tokens=NEW, stop_tokens=stop))
    assert completion.finish == "stop" and stop[0] not in completion.tokens
    (longer,) = engine.generate(
        prompts[4:5], SamplingParams(max_tokens=NEW, stop_tokens=stop, min_tokens=5)
    )
    assert len(longer.tokens) >= 5 and stop[0] not in longer.tokens[:5]


def test_logprobs_are_those_of_the_model(model, engine, prompts):
    (completion,) = engine.generate(prompts[4:5], SamplingParams(max_tokens=2, logprobs=3))
    logits = jax.jit(lambda model, tokens: model(tokens))(model, np.array([prompts[4]]))[0, -1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    first = completion.logprobs[0]
    assert first.logprob == pytest.approx(expected.max(), abs=1e-4)
    assert [token for token, _ in first.top] == np.argsort(-expected)[:3].tolist()


def test_prompts_are_rated_as_the_model_rates_them(model, engine, prompts):
    """Whatever is in the cache, and among other requests."""
    params = SamplingParams(max_tokens=2, prompt_logprobs=2)
    completions = engine.generate(prompts, [params] * len(prompts))
    for prompt, completion in zip(prompts, completions, strict=True):
        assert len(completion.prompt_logprobs) == len(prompt) - 1 and len(completion.tokens) == 2
        logits = jax.jit(lambda model, tokens: model(tokens))(model, np.array([prompt]))[0]
        expected = np.asarray(jax.nn.log_softmax(logits))
        for t, rated in enumerate(completion.prompt_logprobs):
            assert rated.logprob == pytest.approx(expected[t, prompt[t + 1]], abs=1e-4)
            best = sorted(expected[t])[-2:]
            assert [value for _, value in rated.top] == pytest.approx(best[::-1], abs=1e-4)
    (again,) = engine.generate(prompts[-1:], params)
    assert again.prompt_logprobs == completions[-1].prompt_logprobs
    assert is_empty(engine)


def test_too_few_pages_retract_the_youngest_and_lose_nothing(model, folder, prompts):
    with Engine(
        model, max_streams=4, page_tokens=8, kv_tokens=128, lookup=False, folder=folder
    ) as small:
        long = SamplingParams(max_tokens=60)
        each = [small.generate([prompt], long)[0].tokens for prompt in prompts]
        assert [c.tokens for c in small.generate(prompts, long)] == each
        assert is_empty(small)
    totals = small.snapshot().totals
    assert totals["retractions"] > 0
    assert totals["prompt_tokens"] == 2 * sum(map(len, prompts)) + 1  # that of `is_empty`


def test_guesses_from_a_prediction_are_taken_over(engine, prompts, alone):
    params = SamplingParams(max_tokens=NEW, prediction=tuple(prompts[4][-3:]) + alone[4])
    generation = engine.submit(prompts[4], params)
    tokens = [token for delta in generation for token in delta.tokens]
    assert tuple(tokens) == alone[4]
    assert generation.usage.accepted_tokens > 0


def test_penalties_count_guessed_tokens(engine, prompts, alone, monkeypatch):
    """A text with penalties is the same with guesses, and beside a text that is guessed."""
    penalties = SamplingParams(
        max_tokens=40, repetition_penalty=1.2, frequency_penalty=0.1, presence_penalty=0.1
    )
    with monkeypatch.context() as patched:
        patched.setattr(launcher, "MOST_GUESSING", 0)
        (plain,) = engine.generate(prompts[4:5], penalties)
    assert plain.tokens[:NEW] != alone[4]
    predicted = dataclasses.replace(penalties, prediction=(*prompts[4][-3:], *plain.tokens))
    generation = engine.submit(prompts[4], predicted)
    assert tuple(token for delta in generation for token in delta.tokens) == plain.tokens
    assert generation.usage.accepted_tokens > 0
    other = dataclasses.replace(GREEDY, prediction=(*prompts[5][-3:], *alone[5]))
    beside, _ = engine.generate(prompts[4:6], [penalties, other])
    assert beside.tokens == plain.tokens


def test_equal_prefixes_are_read_once(engine, prompts):
    prompt = [9] * 20 + prompts[4]
    for cached in (0, 48):
        generation = engine.submit(prompt, GREEDY)
        list(generation)
        assert generation.usage.cached_tokens == cached


def test_cancelled_requests_give_everything_back(engine, prompts):
    generations = [engine.submit(p, SamplingParams(max_tokens=20)) for p in prompts[:6] * 5]
    for generation in generations[::2]:
        generation.cancel()
    ends = [list(generation)[-1].finish for generation in generations]
    assert set(ends) <= {"cancelled", "length"} and "length" in ends[1::2]
    assert is_empty(engine)


def test_an_event_loop_gets_the_tokens(engine, prompts, alone):
    async def read(prompt):
        return [token async for delta in engine.submit(prompt, GREEDY) for token in delta.tokens]

    async def read_all():
        return await asyncio.gather(*map(read, prompts))

    assert list(map(tuple, asyncio.run(read_all()))) == alone


class Limited:
    """A grammar that allows every token, and fails after some."""

    def __init__(self, most):
        self.most, self.count, self.is_complete = most, 0, False

    def fill_mask(self, mask):
        if self.count >= self.most:
            raise ValueError("the grammar is beyond its limits")
        mask[:] = -1

    def accept(self, token):
        del token
        self.count += 1
        return True

    def rollback(self, tokens):
        self.count -= tokens


@pytest.mark.parametrize("most", [0, 3])
def test_a_grammar_beyond_its_limits_fails_alone(engine, prompts, alone, most):
    limited = engine.submit(prompts[4], SamplingParams(max_tokens=NEW, matcher=Limited(most)))
    assert engine.generate(prompts, GREEDY)[4].tokens == alone[4]
    deltas = list(limited)
    assert deltas[-1].finish == "error" and "beyond its limits" in deltas[-1].error
    assert sum(len(delta.tokens) for delta in deltas) == most
    assert is_empty(engine)


def test_a_grammar_without_a_token_left_ends_the_text(engine, prompts):
    class Refusing(Limited):
        def accept(self, token):
            return self.count < 2 and super().accept(token)

    params = SamplingParams(max_tokens=NEW, matcher=Refusing(NEW))
    (completion,) = engine.generate(prompts[:1], params)
    assert completion.finish == "stop" and len(completion.tokens) == 2


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=NEW, temperature=1, seed=2)])
def test_a_draft_model_changes_no_text_and_is_always_right_if_it_is_the_model(
    model, engine, prompts, folder, params
):
    expected = [engine.generate([prompt], params)[0].tokens for prompt in prompts]
    with Engine(
        model, max_streams=4, page_tokens=8, lookup=False, draft=model, folder=folder
    ) as drafting:
        assert drafting.is_exact
        assert [drafting.generate([p], params)[0].tokens for p in prompts] == expected
        totals = drafting.snapshot().totals
        assert totals["guessed_tokens"] == totals["accepted_tokens"] > len(prompts) * NEW // 2
        assert totals["steps"] < len(prompts) * NEW
        assert [c.tokens for c in drafting.generate(prompts, params)] == expected
        # The prefix that was found is one that the draft knows too.
        assert drafting.generate(prompts[-1:], params)[0].tokens == expected[-1]
        assert is_empty(drafting)


def test_wide_steps_of_a_prompt_change_no_text():
    config = dataclasses.replace(CONFIG, layers=1, windows=(None,), weights="out_in")
    model = jax.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))()
    prompt = np.random.default_rng(9).integers(0, 256, 100).tolist()
    made = []
    for chunk in (32, 128):
        with Engine(model, max_streams=1, chunk=chunk, lookup=False) as engine:
            tokens = engine.generate([prompt], GREEDY)[0].tokens
        made.append((tokens, engine.snapshot().totals["steps"]))
    (text, steps), (wide_text, wide_steps) = made
    assert wide_text == text and wide_steps == steps - 3


def test_a_draft_of_another_model_changes_no_text(model, engine, prompts, folder, alone):
    config = dataclasses.replace(CONFIG, layers=1, windows=(None,), context=48, tied=False)
    other = jax.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(1)))()
    with Engine(model, max_streams=4, page_tokens=8, draft=other, folder=folder) as drafting:
        assert [c.tokens for c in drafting.generate(prompts[:3], GREEDY)] == alone[:3]
        assert [c.tokens for c in drafting.generate(prompts, GREEDY)] == alone
        totals = drafting.snapshot().totals
        assert 0 <= totals["accepted_tokens"] < totals["guessed_tokens"]


def test_a_draft_with_fewer_tokens_is_refused(model):
    config = dataclasses.replace(CONFIG, vocab=128)
    other = jax.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(1)))()
    with pytest.raises(ValueError, match="draft has 128 tokens, the model has 256"):
        Engine(model, max_streams=2, page_tokens=8, draft=other)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_texts_with_keys_and_values_in_fewer_bits(model, prompts, alone, folder, dtype):
    """They are the same whatever runs beside them, and near those in float32."""
    params = SamplingParams(max_tokens=NEW, prompt_logprobs=0)
    with Engine(model, max_streams=4, page_tokens=8, folder=folder) as engine:
        exact = engine.generate(prompts[-1:], params)[0].prompt_logprobs
        whole = engine.programs.bytes_of_cache
    with Engine(model, max_streams=4, page_tokens=8, kv_dtype=dtype, folder=folder) as engine:
        each = [engine.generate([prompt], params)[0] for prompt in prompts]
        together = engine.generate(prompts, params)
        assert [c.tokens for c in together] == [c.tokens for c in each]
        near = [rated.logprob for rated in each[-1].prompt_logprobs]
        assert near == pytest.approx([rated.logprob for rated in exact], abs=0.05)
        share = {"bfloat16": 0.5, "int8": (16 + 4) / 64}[dtype]
        assert engine.programs.bytes_of_cache == whole * share
        assert is_empty(engine)


@pytest.mark.parametrize(
    "wafer",
    [
        pytest.param(lambda: wk.Wafer.devices(2, 2), id="2x2"),
        pytest.param(lambda: wk.Wafer.virtual(wk.WSE2, height=2, width=2), id="virtual"),
    ],
)
def test_texts_on_a_wafer(model, prompts, alone, wafer):
    with Engine(model, max_streams=2, page_tokens=8, lookup=False, wafer=wafer()) as engine:
        assert [c.tokens for c in engine.generate(prompts[:5], GREEDY)] == alone[:5]
        assert engine.snapshot().grid == (2, 2)


def test_a_second_start_compiles_nothing_and_makes_the_same_texts(
    model, folder, engine, prompts, alone
):
    assert engine.programs.compiled
    with Engine(model, max_streams=4, page_tokens=8, folder=folder) as again:
        assert again.programs.loaded and not again.programs.compiled
        assert [c.tokens for c in again.generate(prompts, GREEDY)] == alone


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, ValueError, "no tokens"),
        ([256], {}, ValueError, "token 256 is none of the model's 256"),
        ([1] * 128, {}, PromptTooLong, "shorten it"),
        ([1], {"top_p": 1.5}, ValueError, "top_p=1.5"),
        ([1], {"logit_bias": {999: 1.0}}, ValueError, "token 999"),
    ],
)
def test_refuses(engine, prompt, params, error, message):
    with pytest.raises(error, match=message):
        engine.submit(prompt, SamplingParams(**params))
