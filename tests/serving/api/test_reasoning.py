"""Reasoning, as its format asks: apart, within the content, or nowhere."""

from typing import Any

import cerebras.cloud.sdk
import httpx
import openai
import pytest
from scripted_engine import ScriptedEngine

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
SAID = b"<think>\nLet me see.\n</think>\n\nIt is 4."
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}\n{% endfor %}assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(serving):
    with serving(ScriptedEngine(lambda prompt, params: SAID), TEMPLATE) as server:
        yield server


def ask(server, **asked):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=ASKED | asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def prompt_of(server):
    return bytes(server.app.interface.models.loaded["scripted"].engine.asked[-1][0]).decode()


@pytest.mark.parametrize(
    ("layout", "content", "reasoning"),
    [
        (None, "It is 4.", "Let me see."),
        ("parsed", "It is 4.", "Let me see."),
        ("text_parsed", "It is 4.", "Let me see."),
        ("hidden", "It is 4.", None),
        ("raw", SAID.decode(), None),
    ],
)
def test_each_format(thinker, layout, content, reasoning):
    answer = ask(thinker, reasoning_format=layout, logprobs=True)
    choice = answer["choices"][0]
    assert choice["message"].get("reasoning") == reasoning
    assert choice["message"]["content"] == content
    tokens = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert tokens.endswith("It is 4.") and ("Let me" in tokens) == (layout == "raw")
    assert ("reasoning_logprobs" in choice) == (reasoning is not None)
    if layout != "raw":
        details = answer["usage"]["completion_tokens_details"]
        assert 0 < details["reasoning_tokens"] < answer["usage"]["completion_tokens"] == len(SAID)


def test_reasoning_is_streamed_apart(thinker):
    with cerebras.cloud.sdk.Cerebras(base_url=thinker.url, api_key="k") as client:
        chunks: Any = list(client.chat.completions.create(**ASKED, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.reasoning or "" for delta in deltas) == "Let me see."
    assert "".join(delta.content or "" for delta in deltas) == "It is 4."


def test_how_to_reason_reaches_the_template(thinker):
    for asked in ({"reasoning_effort": "none"}, {"disable_reasoning": True}):
        ask(thinker, **asked)
        assert prompt_of(thinker).endswith("<think></think>")
    ask(thinker, reasoning_effort="high")
    assert prompt_of(thinker).endswith("assistant:")


def test_earlier_reasoning_is_shown_or_cleared(thinker):
    said = {"role": "assistant", "content": "4", "reasoning": "easy"}
    messages = [*ASKED["messages"], said, {"role": "user", "content": "Sure?"}]
    ask(thinker, messages=messages)
    assert "<think>easy</think>" in prompt_of(thinker)
    ask(thinker, messages=messages, clear_thinking=True)
    assert "easy" not in prompt_of(thinker)


def test_reasoning_is_an_item_of_a_response(thinker):
    with openai.OpenAI(base_url=f"{thinker.url}/v1", api_key="k") as client:
        with client.responses.stream(model="scripted", input="Hi") as stream:
            kinds = [event.type for event in stream]
            response = stream.get_final_response()
        items: Any = response.output
        assert [item.type for item in items] == ["reasoning", "message"]
        assert items[0].content[0].text == "Let me see." and response.output_text == "It is 4."
        assert "response.reasoning_text.delta" in kinds and "response.reasoning_text.done" in kinds
        details: Any = response.usage
        assert details.output_tokens_details.reasoning_tokens > 0
        client.responses.create(model="scripted", input="Sure?", previous_response_id=response.id)
    assert "<think>Let me see.</think>It is 4." in prompt_of(thinker)


def test_the_helpers_of_the_client_that_read_answers(serving):
    import pydantic

    class Number(pydantic.BaseModel):
        a: int

    engine = ScriptedEngine(lambda prompt, params: b'{"a": 5}')
    with (
        serving(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="k") as client,
    ):
        parsed = client.chat.completions.parse(**ASKED, response_format=Number)
        assert parsed.choices[0].message.parsed == Number(a=5)
        response = client.responses.parse(model="scripted", input="Hi", text_format=Number)
        assert response.output_parsed == Number(a=5)
        with client.chat.completions.stream(**ASKED, response_format=Number, n=2) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[1].message.parsed == Number(a=5)
