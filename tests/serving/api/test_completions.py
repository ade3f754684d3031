"""Completions of bare prompts, as both real clients ask for them."""

import httpx
import openai
import pytest

HELLO = "Hello there, how are you?"


@pytest.fixture(params=["openai", "cerebras"])
def client(request, openai_client, cerebras_client):
    return openai_client if request.param == "openai" else cerebras_client


def complete(client, **asked):
    return client.completions.create(**{"model": "scripted", "prompt": "ab"} | asked)


def test_a_whole_answer(client):
    answer = complete(client)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (HELLO, "stop")
    assert answer.object == "text_completion" and answer.system_fingerprint == "fp_test"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, len(HELLO))


def test_a_stream(client):
    chunks = list(complete(client, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == HELLO
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len(HELLO)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [b"ab"]),
        (["ab", "c"], [b"ab", b"c"]),
        ([97, 98], [b"ab"]),
        ([[97, 98], [99]], [b"ab", b"c"]),
    ],
)
def test_a_prompt_is_text_or_tokens_one_or_several(client, engine, prompt, prompts):
    answer = complete(client, prompt=prompt, n=2)
    assert [bytes(tokens) for tokens, _ in engine.asked] == [p for p in prompts for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(2 * len(prompts)))
    assert answer.usage.prompt_tokens == sum(map(len, prompts))


def test_echo_and_logprobs_in_the_old_form(client):
    answer = complete(client, echo=True, logprobs=2, max_tokens=3)
    choice = answer.choices[0]
    assert choice.text == "abHel"
    assert choice.logprobs.tokens == list("abHel")
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.token_logprobs == [None, -2.0, -1.0, -1.0, -1.0]
    assert choice.logprobs.top_logprobs[1] == {"b": -2.0, "~": -3.0, "\x7f": -4.0}
    assert choice.logprobs.top_logprobs[2] == {"H": -1.0, "I": -2.0}


def test_a_prompt_can_be_rated_without_a_token_more(client):
    answer = complete(client, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == "ab" and choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs == [None, -2.0]
    assert choice.logprobs.text_offset == [0, 1] and answer.usage.completion_tokens == 0


def test_offsets_grow_over_a_stream(client):
    chunks = list(complete(client, logprobs=0, stream=True, max_tokens=3, echo=True))
    offsets = [place for c in chunks for place in c.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2, 3, 4]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "abHel"


def test_the_best_of_several_texts(openai_client, engine):
    texts = iter(["xxxx", "yyyy", "zzzz"])
    engine.reply = lambda prompt, params: next(texts).encode()
    engine.logprob_of = {ord("x"): -3.0, ord("y"): -1.0, ord("z"): -2.0}
    answer = complete(openai_client, n=2, best_of=3)
    assert [choice.text for choice in answer.choices] == ["yyyy", "zzzz"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 12


def test_tokens_in_place_of_text(cerebras_client):
    answer = complete(cerebras_client, return_raw_tokens=True, max_tokens=2)
    assert answer.choices[0].tokens == [72, 101] and answer.choices[0].text is None


def test_a_stop_string(client, engine):
    answer = complete(client, stop="there")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello ", "stop")
    assert answer.usage.completion_tokens == len("Hello there") and not engine.running


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 40, "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"grammar_root": "x"}, "grammar_root"),
        ({"best_of": 21}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_refuses(server, asked, param):
    body = {"model": "scripted", "prompt": "ab"} | asked
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_prompt_that_fills_the_context(openai_client):
    with pytest.raises(openai.BadRequestError) as refusal:
        complete(openai_client, prompt=[1] * 4096)
    assert refusal.value.code == "context_length_exceeded"
    assert refusal.value.response.headers["x-should-retry"] == "false"
