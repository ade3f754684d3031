"""`/v1/responses`, as OpenAI's client asks for it."""

import httpx
import openai
import pytest

HELLO = "Hello there, how are you?"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}}


def respond(client, **asked):
    return client.responses.create(**{"model": "scripted", "input": "Hi"} | asked)


def post(server, **asked):
    body = {"model": "scripted", "input": "Hi"} | asked
    return httpx.post(f"{server.url}/v1/responses", json=body)


def test_a_whole_answer(openai_client):
    response = respond(openai_client, instructions="Be brief.", metadata={"a": "b"})
    assert (response.output_text, response.status, response.object) == (
        HELLO,
        "completed",
        "response",
    )
    prompt = len("system: Be brief.\nuser: Hi\nassistant:")
    assert response.usage.input_tokens == prompt and response.usage.output_tokens == len(HELLO)
    assert response.metadata == {"a": "b"} and response.instructions == "Be brief."


def test_a_stream_tells_how_each_item_comes_to_be(openai_client):
    with openai_client.responses.stream(model="scripted", input="Hi") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == HELLO
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == HELLO


def test_a_text_that_is_cut_is_incomplete(openai_client):
    response = respond(openai_client, max_output_tokens=5)
    assert (response.status, response.output_text) == ("incomplete", "Hello")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert list(respond(openai_client, max_output_tokens=5, stream=True))[-1].type == (
        "response.incomplete"
    )


def test_a_conversation_goes_on_from_a_stored_response(openai_client, engine):
    first = respond(openai_client)
    respond(openai_client, input="And?", previous_response_id=first.id)
    text = bytes(engine.asked[-1][0]).decode()
    assert text == f"user: Hi\nassistant: {HELLO}\nuser: And?\nassistant:"
    assert openai_client.responses.retrieve(first.id).output_text == HELLO
    openai_client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        respond(openai_client, previous_response_id=first.id)


def test_what_is_not_stored_is_not_there(openai_client):
    first = respond(openai_client, store=False)
    with pytest.raises(openai.NotFoundError):
        respond(openai_client, previous_response_id=first.id)


def test_a_call_of_a_function_and_its_result(openai_client, engine):
    engine.reply = lambda prompt, params: CALL.encode()
    response = respond(openai_client, tools=[TOOL])
    (call,) = response.output
    assert (call.type, call.name, call.arguments) == ("function_call", "add", '{"a": 1}')
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    respond(openai_client, input=[result], previous_response_id=response.id, tools=[TOOL])
    assert "42" in bytes(engine.asked[-1][0]).decode()


def test_a_call_is_streamed(openai_client, engine):
    engine.reply = lambda prompt, params: CALL.encode()
    events = list(respond(openai_client, tools=[TOOL], stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == '{"a": 1}'
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert done.arguments == '{"a": 1}' and events[-1].response.output[0].name == "add"


def test_items_of_every_kind(server, engine):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": "easy"},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"type": "message", "role": "assistant", "content": "2"},
        {"type": "message", "role": "user", "content": "Sure?"},
    ]
    assert post(server, input=items).status_code == 200
    text = bytes(engine.asked[0][0]).decode()
    assert text.startswith("user: 1+1?\nassistant:") and text.endswith("Sure?\nassistant:")


def test_logprobs(server):
    answer = post(server, include=["message.output_text.logprobs"], top_logprobs=1).json()
    logprobs = answer["output"][0]["content"][0]["logprobs"]
    assert "".join(one["token"] for one in logprobs) == HELLO
    assert len(logprobs[0]["top_logprobs"]) == 1


def test_the_oldest_messages_make_room_if_they_may(server, engine):
    items = [{"role": "user", "content": "x" * 3000}, {"role": "user", "content": "y" * 3000}]
    refused = post(server, input=items)
    assert refused.status_code == 400
    assert refused.json()["code"] == "context_length_exceeded"
    assert refused.json()["param"] == "input"
    assert post(server, input=items, truncation="auto").status_code == 200
    assert b"x" not in bytes(engine.asked[-1][0])[6:]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"n": 2}, "n"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"metadata": {"a": 1}}, "metadata"),
    ],
)
def test_refuses(server, asked, param):
    answer = post(server, **asked)
    assert answer.status_code == 400, answer.text
    assert answer.json()["param"].startswith(param)


def test_a_fault_in_a_stream_is_its_last_event(openai_client, engine):
    engine.error, engine.error_after = "its logits are NaN", 3
    events = list(respond(openai_client, stream=True))
    assert events[-1].type == "error" and "NaN" in events[-1].message
