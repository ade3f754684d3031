"""Whatever clients send: an answer that says what is wrong, and never a 500."""

import copy
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HI = {"role": "user", "content": "Hi"}
ASKED: dict[str, Any] = {"model": "scripted", "messages": [HI]}


def post(server, body, path="/v1/chat/completions"):
    return httpx.post(f"{server.url}{path}", content=json.dumps(body))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [HI | {"mood": "good"}]}, "messages[0].mood"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [HI] * 10_001}, "messages"),
        ({"foo": 1}, "foo"),
        ({"store": True}, "store"),
        ({"metadata": {}}, "metadata"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 100}, "n"),
        ({"n": 10**30}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 10**400}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0663": 1}}, "logit_bias"),
        ({"logit_bias": {"256": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"reasoning_effort": "maximal"}, "reasoning_effort"),
        ({"reasoning_format": "x"}, "reasoning_format"),
        ({"prediction": {"type": "content"}}, "prediction.content"),
        ({"prompt_cache_key": "x" * 1025}, "prompt_cache_key"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"model_parameters": {"x": 1}}, "model_parameters.x"),
    ],
)
def test_the_field_that_is_wrong_is_named(server, asked, param):
    answer = post(server, ASKED | asked)
    body = answer.json()
    assert (answer.status_code, body["param"]) == (400, param), body
    assert body["error"] == {k: body[k] for k in ("message", "type", "param", "code", "id")}
    assert body["type"] == "invalid_request_error" and body["id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("kind", ["image_url", "image", "input_audio", "file"])
def test_what_the_model_cannot_see_is_named(server, kind):
    part = {"type": kind, kind: {"url": "data:image/png;base64,AAAA"}}
    content = [{"type": "text", "text": "What is this?"}, part]
    answer = post(server, ASKED | {"messages": [{"role": "user", "content": content}]})
    assert answer.status_code == 400 and kind in answer.json()["message"]
    assert answer.json()["param"] == "messages[0].content[1]"


def test_a_prompt_that_fills_the_context_is_not_tried_again(openai_client):
    with pytest.raises(openai.BadRequestError) as refusal:
        openai_client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "x" * 5000}]
        )
    assert refusal.value.code == "context_length_exceeded"
    assert refusal.value.response.headers["x-should-retry"] == "false"


def test_a_template_that_passes_its_limits_for_these_messages(serving, engine):
    loop = "{% for m in messages %}{% for _ in messages %}{{ m.content }}{% endfor %}{% endfor %}"
    with serving(engine, loop) as quadratic:
        answer = post(quadratic, ASKED | {"messages": [HI | {"content": "x" * 20}] * 2000})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_messages")
    assert "more than 10,000,000 characters" in answer.json()["message"]
    assert not engine.asked


def test_a_queue_that_is_full(openai_client, engine):
    engine.queue_is_full = True
    with pytest.raises(openai.RateLimitError) as refusal:
        openai_client.chat.completions.create(**ASKED, n=2)
    headers = refusal.value.response.headers
    assert (headers["retry-after"], headers["x-should-retry"]) == ("1", "true")
    assert refusal.value.code == "queue_exceeded" and not engine.running


def test_errors_stay_small_whatever_was_sent(server):
    for text in ("x" * 10_000, "\u2603" * 10_000, '"\\\x00' * 5000, "\U0001f600" * 10_000):
        for body in (ASKED | {text: 1}, ASKED | {"model": text[:499]}, ASKED | {"stop": {text: 1}}):
            answer = post(server, body)
            assert 400 <= answer.status_code < 500 and len(answer.content) < 2048


# Values that no field expects, or that are at the edge of what it takes.
_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**40), max_value=10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["\ud800", "", "<|im_end|>", "\x00", "auto", "json_schema", "x" * 5000]),
    st.lists(st.integers(-2, 300), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.recursive(st.just(1), lambda below: st.lists(below, max_size=2), max_leaves=5),
)
_WHOLE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": ASKED
    | {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {
                "role": "assistant",
                "content": None,
                "reasoning": "r",
                "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "tool_call_id": "c", "content": "1"},
            HI,
        ],
        "n": 2,
        "max_completion_tokens": 3,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"1": 5},
        "stop": ["q"],
        "seed": 1,
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}},
        },
        "reasoning_effort": "low",
        "model_parameters": {"top_k": 3},
    },
    "/v1/completions": {
        "model": "scripted",
        "prompt": ["a", "b"],
        "max_tokens": 3,
        "best_of": 2,
        "echo": True,
        "logprobs": 1,
        "stop": "q",
        "return_raw_tokens": False,
    },
    "/v1/responses": {
        "model": "scripted",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "reasoning", "id": "r", "summary": []},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": "1"},
        ],
        "max_output_tokens": 3,
        "text": {"format": {"type": "json_object"}},
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "store": False,
    },
}


def places_of(value, path=()):
    """The way to every value within a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places_of(one, (*path, key))


@st.composite
def requests(draw):
    """A route, and a request for it of which a few values are others, missing or new."""
    route = draw(st.sampled_from(sorted(_WHOLE)))
    body = copy.deepcopy(_WHOLE[route])
    for _ in range(draw(st.integers(0, 2))):
        *path, last = draw(st.sampled_from(list(places_of(body))))
        inner: Any = body
        for key in path:
            inner = inner[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add", "repeat"]))
        if change == "replace":
            inner[last] = draw(_ODD)
        elif change == "remove":
            del inner[last]
        elif change == "add" and isinstance(inner, dict):
            inner[draw(st.text(max_size=8))] = draw(_ODD)
        elif isinstance(inner, list):
            inner *= draw(st.integers(0, 30))
        if not body:
            break
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    content = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:  # a byte of it is another
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    return route, content


@pytest.fixture(scope="module")
def connection(shared_server):
    with httpx.Client(base_url=shared_server.url) as client:
        yield client


@settings(
    max_examples=1000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(request=requests())
def test_a_thousand_random_requests_meet_no_fault(connection, request):
    route, content = request
    answer = connection.post(route, content=content)
    assert answer.status_code in (200, 400, 404, 413), (content, answer.text)
    if answer.status_code != 200:
        body = answer.json()
        assert body["error"]["message"] == body["message"] and len(answer.content) < 2048
    elif answer.headers["content-type"] == "application/json":
        json.loads(answer.text, parse_constant=lambda name: pytest.fail(name))
    assert '"status_code":500' not in answer.text
