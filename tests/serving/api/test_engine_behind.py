"""The interface before the real engine, with a tiny random model on bytes."""

import concurrent.futures
import json
import socket
import threading
import time
from typing import Any

import cerebras.cloud.sdk
import httpx
import jax
import jax.numpy as jnp
import openai
import pytest
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder
from models.text.tokenizer import bytes_tokenizer
from serving.api.app import build_app
from serving.api.registry import LoadedModels, ModelCard, Served
from serving.api.server import ENGINE_FAILED, HttpServer
from serving.engine import Engine, EngineClosed
from serving.request import SamplingParams
from serving.text.model_text import ModelText

CONFIG = DecoderConfig(
    vocab=257, d_model=32, d_ff=64, layers=2, heads=2, kv_heads=1, context=1024, stacked=True
)
NAN = 256  # a token that makes the model's numbers NaN; the tokenizer lacks it, so no text has it
ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PROMPT = list(b"user: Hi\nassistant:")


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory):
    """Makes engines of the same model; all but the first find their programs."""
    model = Decoder(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32)
    assert isinstance(model.embedding, nnx.Param)
    model.embedding[...] = model.embedding[...].at[NAN].set(jnp.nan)
    folder = tmp_path_factory.mktemp("programs")
    return lambda: Engine(model, bytes_tokenizer(), max_streams=4, kv_tokens=4096, folder=folder)


@pytest.fixture(scope="module")
def engine(make_engine):
    with make_engine() as engine:
        yield engine


def server_of(engine):
    text = ModelText(bytes_tokenizer(), vocab=CONFIG.vocab)
    card = ModelCard(name="tiny", context=engine.max_tokens)
    served = Served(card=card, engine=engine, text=text, fingerprint="fp_tiny")
    return HttpServer(build_app(LoadedModels([served])), port=0)


@pytest.fixture(scope="module")
def tiny(engine):
    server = server_of(engine)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["openai", "cerebras"])
def client(request, tiny):
    if request.param == "openai":
        with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="k", max_retries=0) as one:
            yield one
    else:
        with cerebras.cloud.sdk.Cerebras(base_url=tiny.url, api_key="k", max_retries=0) as other:
            yield other


def post(server, **asked):
    return httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | asked, timeout=60)


def complete(server, **asked):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "return_raw_tokens": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | asked, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_until(engine, *, busy):
    end = time.monotonic() + 30
    while (state := engine.snapshot()) and busy != bool(
        state.slots or state.waiting or state.pages_held
    ):
        assert time.monotonic() < end, state
        time.sleep(0.01)


def test_a_text_is_the_engines_whole_and_streamed(client, engine):
    (alone,) = engine.generate([PROMPT], SamplingParams(max_tokens=16))
    answer = client.chat.completions.create(**ASKED, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].finish_reason == "length"
    chunks = list(
        client.chat.completions.create(**ASKED, temperature=0, max_tokens=16, stream=True)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone.text
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens == 16


def test_seeds_give_texts_again_and_each_choice_its_own(tiny):
    def texts(**asked):
        choices = complete(tiny, **asked)["choices"]
        return [choice["tokens"] for choice in choices]

    several = texts(seed=5, n=3)
    assert several == texts(seed=5, n=3) and len({tuple(text) for text in several}) == 3
    assert texts(seed=5) == several[:1]
    assert texts() != texts()


def test_several_prompts_are_answered_each_as_alone(tiny):
    prompts = [list(b"one"), list(b"another"), list(b"a third")]
    together = complete(tiny, prompt=prompts, temperature=0)["choices"]
    alone = [complete(tiny, prompt=one, temperature=0)["choices"][0] for one in prompts]
    assert [choice["tokens"] for choice in together] == [choice["tokens"] for choice in alone]


def test_logprobs_are_those_of_a_distribution(tiny):
    answer = post(tiny, logprobs=True, top_logprobs=5, temperature=0, max_tokens=8).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert content and all(one["logprob"] <= 0 for one in content)
    for one in content:
        tops = [top["logprob"] for top in one["top_logprobs"]]
        assert tops == sorted(tops, reverse=True) and len(tops) == 5
        assert one["top_logprobs"][0]["token"] == one["token"]


def test_biases_stops_and_least_lengths(tiny):
    body = {"logit_bias": {str(ord("z")): 100}, "max_tokens": 5}
    assert post(tiny, **body).json()["choices"][0]["message"]["content"] == "zzzzz"
    stopped = post(tiny, **body, stop=["zz"]).json()
    assert stopped["choices"][0]["message"]["content"] == ""
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] == 2
    later = post(tiny, **body, stop=["zz"], min_tokens=3).json()
    assert later["choices"][0]["message"]["content"] == "zz"
    whole = complete(tiny, max_tokens=-1, min_tokens=-1)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["total_tokens"] == CONFIG.context


def test_the_cache_and_the_prediction_are_in_the_usage(tiny, engine):
    prompt = list(b"x" * 100)
    complete(tiny, prompt=prompt, temperature=0)
    usage = complete(tiny, prompt=prompt, temperature=0, n=2)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64
    assert usage["prompt_tokens"] == 100 and usage["completion_tokens"] == 32


def test_a_prediction_that_comes_true_is_in_the_usage(tiny):
    letters = {ord(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    bias = {str(token): -100 for token in range(256) if token not in letters}
    body = {"logit_bias": bias, "max_tokens": 60, "temperature": 0}
    text = post(tiny, **body).json()["choices"][0]["message"]["content"]
    answer = post(tiny, **body, prediction={"type": "content", "content": text}).json()
    assert answer["choices"][0]["message"]["content"] == text
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 0
    assert answer["usage"]["completion_tokens"] == 60


FORM = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_its_schema(client, stream):
    shape = {"name": "n", "schema": FORM, "strict": True}
    answer = client.chat.completions.create(
        **ASKED, response_format={"type": "json_schema", "json_schema": shape}, stream=stream
    )
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
    found = json.loads(text)
    assert found["a"] in ("x", "y") and isinstance(found["b"], bool) and len(found) == 2


def test_a_call_that_must_come_comes(client):
    tool = {"type": "function", "function": {"name": "pick", "parameters": FORM, "strict": True}}
    for choice in ("required", {"type": "function", "function": {"name": "pick"}}):
        answer = client.chat.completions.create(
            **ASKED, tools=[tool], tool_choice=choice, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "pick" and set(json.loads(call.function.arguments)) == {*"ab"}
        assert answer.choices[0].finish_reason == "tool_calls"


def test_responses(tiny):
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="k", max_retries=0) as one:
        shape: Any = {"type": "json_schema", "name": "n", "schema": FORM}
        response = one.responses.create(model="tiny", input="Hi", text={"format": shape})
        assert set(json.loads(response.output_text)) == {*"ab"}
        again = one.responses.create(
            model="tiny", input="And?", previous_response_id=response.id, max_output_tokens=5
        )
        assert again.status == "incomplete" and again.usage and again.usage.output_tokens == 5


def test_logits_of_nan_fail_their_request_alone(tiny, engine, monkeypatch):
    """One beside it goes on, and a later one takes over the pages that it had."""
    healthy = {"prompt": list(b"healthy"), "temperature": 0, "max_tokens": 40}
    alone = complete(tiny, **healthy)["choices"][0]["tokens"]
    run, all_came = engine.programs.run, threading.Event()
    monkeypatch.setattr(engine.programs, "run", lambda *step: all_came.wait() and run(*step))

    def ask(stream):
        asked = {"model": "tiny", "prompt": [1, NAN, 2], "max_tokens": 9, "stream": stream}
        return httpx.post(f"{tiny.url}/v1/completions", json=asked, timeout=60)

    with concurrent.futures.ThreadPoolExecutor() as threads:
        beside = threads.submit(complete, tiny, **healthy)
        failing = [threads.submit(ask, stream) for stream in (False, True)]
        while len(engine._streams) < 3 and not any(one.done() for one in failing):
            time.sleep(0.001)
        all_came.set()
    assert beside.result()["choices"][0]["tokens"] == alone
    assert [one.result().status_code for one in failing] == [500, 200]
    for one in failing:
        assert "generation_failed" in one.result().text and "not finite" in one.result().text
    assert complete(tiny, **healthy)["choices"][0]["tokens"] == alone
    wait_until(engine, busy=False)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_program_fails_ends_the_server(make_engine, monkeypatch, caplog):
    with make_engine() as broken, concurrent.futures.ThreadPoolExecutor() as threads:
        run = broken.programs.run

        def fail(*step):
            if len(broken._streams) == 6:  # both requests are there
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory is left")
            return run(*step)

        monkeypatch.setattr(broken.programs, "run", fail)
        server = server_of(broken)
        asked = [threads.submit(post, server, stream=stream, n=3) for stream in (False, True)]
        assert server.run() == ENGINE_FAILED
        answers = [one.result() for one in asked]
        assert [answer.status_code for answer in answers] == [500, 200]
        assert all("the engine has failed" in answer.text for answer in answers)
        assert "engine failed" in caplog.text
        assert isinstance(broken.failure, jax.errors.JaxRuntimeError)
        with pytest.raises(EngineClosed):
            broken.submit([1], SamplingParams())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_slots_and_pages_within_two_steps(
    tiny, engine, stream, monkeypatch
):
    steps, cancelled = 0, dict[Any, int]()  # when each text was cancelled, in steps
    run, cancel = engine.programs.run, engine._cancel

    def count(*step):
        nonlocal steps
        steps += 1
        return run(*step)

    def note(generation):
        cancelled.setdefault(generation, steps)
        cancel(generation)

    monkeypatch.setattr(engine.programs, "run", count)
    monkeypatch.setattr(engine, "_cancel", note)
    body = json.dumps(ASKED | {"stream": stream, "n": 8, "min_tokens": -1}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(body)}\r\n\r\n"
    for _ in range(3):
        with socket.create_connection((tiny.host, tiny.port)) as sock:
            sock.sendall(head.encode() + body)
            wait_until(engine, busy=True)
        wait_until(engine, busy=False)
        last = max(cancelled.values())
        assert len(cancelled) == 8 and 0 < last and steps - last <= 2
        cancelled.clear()


def test_the_slots_say_what_is_held_and_how_far_a_text_may_go(tiny, engine):
    wait_until(engine, busy=False)
    generation = engine.submit(PROMPT, SamplingParams(max_tokens=900))
    wait_until(engine, busy=True)
    (model,) = httpx.get(f"{tiny.url}/slots?format=full").json()["models"]
    (slot,) = model["slots"]
    assert (slot["prompt_tokens"], slot["most_tokens"]) == (len(PROMPT), 900)
    assert slot["pages"] == model["page_kinds"].count("h") == model["pages_held"]
    assert model["page_kinds"].count(".") == model["pages_free"] and model["grid"] == [1, 1]
    generation.cancel()
    wait_until(engine, busy=False)


def test_bad_input_reaches_no_engine(tiny, engine):
    asked: dict[str, Any]
    for asked in ({"max_tokens": 1025}, {"logit_bias": {"257": 1}}, {"messages": []}):
        assert post(tiny, **asked).status_code == 400
    long = post(tiny, messages=[{"role": "user", "content": "x" * 1100}])
    assert (long.status_code, long.json()["code"]) == (400, "context_length_exceeded")
    wait_until(engine, busy=False)
    slots = httpx.get(f"{tiny.url}/slots").json()
    assert [slot["is_processing"] for slot in slots] == [False] * 4
    assert 'wsekern_pages_held{model="tiny"} 0' in httpx.get(f"{tiny.url}/metrics").text
