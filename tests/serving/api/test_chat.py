"""Chats, as both real clients ask for them."""

import asyncio
import json
from typing import Any

import cerebras.cloud.sdk
import httpx
import openai
import pytest

from serving.api.sampling import choice_seed

HELLO = "Hello there, how are you?"
ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(params=["openai", "cerebras"])
def client(request, openai_client, cerebras_client):
    return openai_client if request.param == "openai" else cerebras_client


def post(server, body, **options):
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, **options)


def events_of(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_whole_answer(client):
    answer = client.chat.completions.create(**ASKED)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", HELLO)
    assert (choice.finish_reason, choice.index) == ("stop", 0)
    assert answer.object == "chat.completion" and answer.system_fingerprint == "fp_test"
    prompt = len("user: Hi\nassistant:")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, len(HELLO))
    assert usage.total_tokens == prompt + len(HELLO)


def test_a_stream(client):
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(text or "" for text in texts) == HELLO
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(HELLO)
    assert {chunk.system_fingerprint for chunk in chunks} == {"fp_test"}
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_alone_if_the_request_includes_it(client):
    chunks = list(
        client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    )
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == len(HELLO)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_last_chunk_has_the_finish_the_usage_and_the_times(server):
    chunks = events_of(post(server, ASKED | {"stream": True}))
    last = chunks[-1]
    assert last["choices"][0]["finish_reason"] == "stop" and last["usage"]
    times = last["time_info"]
    parts = times["queue_time"] + times["prompt_time"] + times["completion_time"]
    assert min(times.values()) >= 0 and parts == pytest.approx(times["total_time"])
    assert not any("usage" in chunk or "time_info" in chunk for chunk in chunks[:-1])


async def ask_both(one, other):
    stream = await one.chat.completions.create(**ASKED, stream=True)
    texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    answer = await other.chat.completions.create(**ASKED)
    await one.close()
    await other.close()
    return "".join(texts), answer.choices[0].message.content


def test_async_clients(server):
    async def ask():
        return await ask_both(
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k"),
            cerebras.cloud.sdk.AsyncCerebras(base_url=server.url, api_key="k"),
        )

    assert asyncio.run(ask()) == (HELLO, HELLO)


def test_several_choices_have_seeds_of_their_own(client, engine):
    answer = client.chat.completions.create(**ASKED, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    seeds = [params.seed for _, params in engine.asked]
    assert seeds == [7, choice_seed(7, 1), choice_seed(7, 2)] and len(set(seeds)) == 3
    assert answer.usage.prompt_tokens == len("user: Hi\nassistant:")
    assert answer.usage.completion_tokens == 3 * len(HELLO)


def test_several_choices_are_streamed_side_by_side(client):
    texts, finishes = {0: "", 1: ""}, dict[int, str]()
    chunks = list(client.chat.completions.create(**ASKED, n=2, stream=True))
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finishes[choice.index] = choice.finish_reason
    assert texts == {0: HELLO, 1: HELLO} and finishes == {0: "stop", 1: "stop"}
    assert chunks[-1].usage.completion_tokens == 2 * len(HELLO)


def test_logprobs(client):
    answer = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=2, max_tokens=2)
    first, second = answer.choices[0].logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("H", -1.0, [72])
    assert [top.token for top in second.top_logprobs] == ["e", "f"]
    chunks = list(client.chat.completions.create(**ASKED, logprobs=True, stream=True))
    found = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert "".join(token.token for part in found for token in part.content) == HELLO


def test_a_stop_string_ends_the_text_and_the_generation(client, engine):
    answer = client.chat.completions.create(
        **ASKED, stop=["how", "zzz"], logprobs=True, max_tokens=20
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Hello there, ", "stop")
    assert "".join(token.token for token in choice.logprobs.content) == "Hello there, "
    assert answer.usage.completion_tokens == len("Hello there, how")
    assert not engine.running


def test_the_engine_is_asked_as_the_client_asks(client, engine):
    client.chat.completions.create(
        **ASKED,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logit_bias={"65": -100},
        max_completion_tokens=10,
        prediction={"type": "content", "content": "Hello"},
        seed=3,
        extra_body={"min_tokens": 4, "model_parameters": {"top_k": 5, "min_p": 0.1}},
    )
    ((_, params),) = engine.asked
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.frequency_penalty, params.presence_penalty) == (0.1, 0.2)
    assert (params.max_tokens, params.min_tokens, params.seed) == (10, 4, 3)
    assert params.logit_bias == {65: -100} and bytes(params.prediction) == b"Hello"


@pytest.mark.parametrize(
    ("asked", "most", "least"),
    [
        ({}, 4077, 0),
        ({"max_tokens": -1}, 4077, 0),
        ({"max_completion_tokens": 4096}, 4077, 0),
        ({"max_tokens": 5, "min_tokens": -1}, 5, 5),
        ({"min_completion_tokens": -1}, 4077, 4077),
    ],
)
def test_how_long_a_text_may_be(server, engine, asked, most, least):
    assert post(server, ASKED | asked).status_code == 200
    ((_, params),) = engine.asked
    assert (params.max_tokens, params.min_tokens) == (most, least)


def test_a_text_of_no_tokens_asks_no_engine(server, engine):
    answer = post(server, ASKED | {"max_completion_tokens": 0}).json()
    assert answer["choices"][0]["finish_reason"] == "length" and not engine.asked
    assert answer["usage"]["completion_tokens"] == 0


def test_what_the_prompt_had_in_the_cache_is_said(server, engine):
    engine.cached = 16
    usage = post(server, ASKED | {"n": 2}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 16


def test_messages_of_every_role_and_form(server, engine):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [{"type": "text", "text": "Really."}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "assistant", "content": "x", "reasoning": "y", "annotations": []},
        {"role": "user", "content": "c", "name": "Ann"},
    ]
    assert post(server, ASKED | {"messages": messages}).status_code == 200
    text = bytes(engine.asked[0][0]).decode()
    assert text.startswith("system: Be brief.\nsystem: Really.\nuser: ab\n")


def test_fields_that_change_nothing_are_taken(server):
    harmless: dict[str, Any] = {
        "user": "u",
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "logit_bias": {},
    }
    harmless |= {"parallel_tool_calls": True, "clear_thinking": True, "reasoning_effort": "low"}
    harmless |= {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}
    harmless |= {"temperature": None, "stop": None}
    answer = post(server, ASKED | harmless)
    assert answer.status_code == 200 and answer.json()["service_tier"] == "default"


def test_a_fault_of_the_engine_fails_its_request_alone(client, engine):
    engine.error = "its logits are NaN"
    kinds = (openai.InternalServerError, cerebras.cloud.sdk.InternalServerError)
    with pytest.raises(kinds, match="NaN"):
        client.chat.completions.create(**ASKED)
    engine.error = ""
    assert client.chat.completions.create(**ASKED).choices[0].message.content == HELLO


def test_a_fault_in_a_stream_is_its_last_event(client, engine):
    engine.error, engine.error_after = "its logits are NaN", 3
    texts = []
    with pytest.raises((openai.APIError, cerebras.cloud.sdk.APIError), match="NaN"):
        for chunk in client.chat.completions.create(**ASKED, stream=True):
            texts.append(chunk.choices[0].delta.content or "")
    assert "".join(texts) == "Hel"


def test_silence_is_broken_by_comments(server, engine):
    engine.pause = 0.5
    text = post(server, ASKED | {"stream": True, "max_tokens": 1}, timeout=20).text
    assert ": ping\n\n" in text
