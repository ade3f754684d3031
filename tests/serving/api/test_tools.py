"""Tools, forms of answers and reasoning: what the model is told, and what clients get."""

import json
from typing import Any

import httpx
import pytest

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
NUMBER = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {"type": "function", "function": {"name": "add", "parameters": NUMBER, "strict": True}}
SUB = {"type": "function", "function": {"name": "sub", "description": "minus"}}
CALL = '<tool_call>\n{"name": "%s", "arguments": {"a": %d}}\n</tool_call>'


@pytest.fixture(params=["openai", "cerebras"])
def client(request, openai_client, cerebras_client):
    return openai_client if request.param == "openai" else cerebras_client


def says(engine, text):
    engine.reply = lambda prompt, params: text.encode()


def takes(matcher, text):
    """Whether a grammar allows a text, byte for byte."""
    return all(matcher.accept(byte) for byte in text.encode())


def test_calls_of_tools(client, engine):
    says(engine, "Let me see.\n" + CALL % ("add", 1) + "\n" + CALL % ("sub", 2))
    answer = client.chat.completions.create(**ASKED, tools=[ADD, SUB])
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    calls = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert calls == [("add", {"a": 1}), ("sub", {"a": 2})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert "minus" in bytes(engine.asked[0][0]).decode()


def test_calls_are_streamed(client, engine):
    says(engine, CALL % ("add", 1))
    chunks = list(client.chat.completions.create(**ASKED, tools=[ADD], stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "add" and calls[0].id and calls[0].type == "function"
    assert json.loads("".join(c.function.arguments for c in calls)) == {"a": 1}
    assert {call.index for call in calls} == {0}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_one_call_alone_ends_the_text(client, engine):
    says(engine, CALL % ("add", 1) + "\n" + CALL % ("add", 2))
    answer = client.chat.completions.create(**ASKED, tools=[ADD], parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 1} and not engine.running


def test_without_tools_nothing_is_a_call(client, engine):
    says(engine, CALL % ("add", 1))
    answer = client.chat.completions.create(**ASKED, tools=[ADD], tool_choice="none")
    assert answer.choices[0].message.content == CALL % ("add", 1)
    assert answer.choices[0].finish_reason == "stop"
    assert "add" not in bytes(engine.asked[0][0]).decode()


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_must_come_is_held_to_a_grammar(client, engine, choice):
    says(engine, CALL % ("add", 1))
    answer = client.chat.completions.create(**ASKED, tools=[ADD, SUB], tool_choice=choice)
    assert answer.choices[0].message.tool_calls[0].function.name == "add"
    matcher = engine.asked[0][1].matcher
    assert not takes(matcher, "Hello")
    assert takes(matcher, CALL % ("add", 1))


def test_a_tool_that_is_named_is_the_only_one(server, engine):
    choice = {"type": "function", "function": {"name": "add"}}
    body = ASKED | {"tools": [ADD, SUB], "tool_choice": choice}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
    assert not takes(engine.asked[0][1].matcher, CALL % ("sub", 1))


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "json_object"}, '{"x": [1]}', "[1]"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "{}", "3"),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}},
            '{"a": 5}',
            '{"b": 5}',
        ),
    ],
)
def test_an_answer_of_a_form_is_held_to_a_grammar(client, engine, form, good, bad):
    says(engine, good)
    answer = client.chat.completions.create(**ASKED, response_format=form, n=2)
    assert [choice.message.content for choice in answer.choices] == [good, good]
    first, second = (params.matcher for _, params in engine.asked)
    assert not takes(first, bad) and takes(second, good)


OPEN = {"type": "object", "properties": {"a": {"type": "object"}}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD | {"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [ADD] * 129}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"functions": []}, "functions"),
    ],
)
def test_refuses(server, asked, param):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | asked)
    assert (answer.status_code, answer.json()["param"]) == (400, param), answer.text


def ask_for(server, schema, *, strict=False, version="2"):
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": strict}}
    return httpx.post(
        f"{server.url}/v1/chat/completions",
        json=ASKED | {"response_format": form},
        headers={"X-Cerebras-Version-Patch": version},
    )


def nested(depth):
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        nested(40),
        {"enum": list(range(2000))},
        {"not": {"type": "string"}},
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "(" * 50},
    ],
)
def test_schemas_out_of_bounds_are_refused(server, schema):
    answer = ask_for(server, schema)
    assert answer.status_code == 400 and answer.json()["param"].startswith("response_format")


def test_strict_schemas_close_every_object_unless_the_client_is_older(server):
    refused = ask_for(server, OPEN, strict=True)
    assert refused.status_code == 400 and "additionalProperties" in refused.json()["message"]
    assert ask_for(server, OPEN, strict=True, version="1").status_code == 200
    assert ask_for(server, OPEN).status_code == 200
    assert ask_for(server, NUMBER, strict=True, version="3").status_code == 400
