"""The fields of `POST /v1/responses`, and how they become those of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from serving.api import fields, schema
from serving.api.errors import ApiError, refuse, shown
from serving.api.json_schemas import check_schema
from serving.request import MOST_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
_text = schema.text(8_000_000)
_name = schema.text(64, least=1, pattern="[a-zA-Z0-9_-]+")
_id = schema.text(200)
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")
_part = schema.record(
    {
        "type": schema.anything,
        "text": _text,
        "annotations": schema.anything,
        "logprobs": schema.anything,
    },
    ("type", "text"),
)


def _eyeless(value: Any, name: str) -> None:
    kind = shown(value["type"])
    refuse(name, f"{name} is of the type {kind}: the model reads text alone; send input_text")


_MEDIA = ("input_image", "input_file", "input_audio")
_parts = schema.several(
    schema.by_field("type", dict.fromkeys(_TEXT_PARTS, _part) | dict.fromkeys(_MEDIA, _eyeless)),
    0,
    1000,
)


def _content(value: Any, name: str) -> str:
    """A text, or parts, which are joined."""
    if isinstance(value, str):
        return _text(value, name)
    return "".join(part["text"] for part in _parts(value, name))


_ITEM = {"type": schema.anything, "id": _id, "status": schema.text(40)}
_message = schema.record(
    _ITEM
    | {
        "role": schema.one_of("system", "developer", "user", "assistant"),
        "content": _content,
        "phase": schema.text(40),
    },
    ("role", "content"),
)
_items = {
    "message": _message,
    "function_call": schema.record(
        _ITEM | {"call_id": _id, "name": _name, "arguments": _text},
        ("call_id", "name", "arguments"),
    ),
    "function_call_output": schema.record(
        _ITEM | {"call_id": _id, "output": _content}, ("call_id", "output")
    ),
    "reasoning": schema.record(
        _ITEM | {"summary": _content, "content": _content, "encrypted_content": schema.anything},
    ),
}
_item_of_a_type = schema.by_field("type", _items)


def _item(value: Any, name: str) -> dict[str, Any]:
    """An item of the input; a message may leave its type out."""
    if isinstance(value, dict) and "type" not in value:
        return _message(value, name) | {"type": "message"}
    return _item_of_a_type(value, name)


def _input(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": _text(value, name)}]
    return schema.several(_item, 1, 10_000)(value, name)


def _false(value: Any, name: str) -> bool:
    if schema.flag(value, name):
        refuse(name, f"{name} is not supported; leave it out")
    return False


def _function_tool(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict) and value.get("type") not in (None, "function"):
        refuse(
            f"{name}.type",
            f"{name} is of the type {shown(value['type'])}; the server has no tools of its own, "
            "only functions of clients",
        )
    return _tool(value, name)


_tool = schema.record(
    {
        "type": schema.constant("function"),
        "name": _name,
        "description": _text,
        "parameters": check_schema,
        "strict": schema.flag,
    },
    ("type", "name"),
)
_plain_format = schema.record({"type": schema.anything})
_format = schema.by_field(
    "type",
    {
        "text": _plain_format,
        "json_object": _plain_format,
        "json_schema": schema.record(
            {
                "type": schema.anything,
                "name": _name,
                "description": _text,
                "schema": check_schema,
                "strict": schema.flag,
            },
            ("name", "schema"),
        ),
    },
)
responses = schema.record(
    {
        "model": schema.text(500, least=1),
        "input": _input,
        "instructions": _text,
        "max_output_tokens": schema.whole(1, 10_000_000),
        "temperature": schema.number(0, 2),
        "top_p": schema.number(0, 1),
        "top_logprobs": schema.whole(0, MOST_LOGPROBS),
        "tools": schema.several(_function_tool, 0, 128),
        "tool_choice": schema.either(
            schema.one_of("none", "auto", "required"),
            schema.record({"type": schema.constant("function"), "name": _name}, ("type", "name")),
        ),
        "parallel_tool_calls": schema.flag,
        "text": schema.record({"format": _format}),
        "reasoning": schema.record(
            {
                "effort": schema.one_of(*fields.EFFORTS, "minimal", "xhigh", "max"),
                "summary": schema.one_of("auto", "concise", "detailed"),
            }
        ),
        "stream": schema.flag,
        "store": schema.flag,
        "metadata": lambda value, name: _metadata(value, name),
        "previous_response_id": _id,
        "include": schema.several(schema.one_of(*_INCLUDED), 0, 10),
        "truncation": schema.one_of("auto", "disabled"),
        "user": schema.text(1024),
        "prompt_cache_key": schema.text(1024),
        "service_tier": schema.one_of("auto", "default", "flex", "priority"),
        "background": _false,
        "conversation": schema.nothing,
    },
    ("model", "input"),
)


def _metadata(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(name, f"{name} is {shown(value)}; it must be an object")
    if len(value) > 16:
        refuse(name, f"{name} has {len(value):,} names; 16 are the most")
    return {key: schema.text(512)(one, f"{name}.{key}") for key, one in value.items()}


def messages_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a chat that say what the items of an input say."""
    messages: list[dict[str, Any]] = []
    for item in items:
        kind = item["type"]
        if kind == "message":
            message = {"role": item["role"], "content": item["content"]}
            is_open = messages and messages[-1].get("content", "") is None
            if item["role"] == "assistant" and is_open and "tool_calls" not in messages[-1]:
                messages[-1]["content"] = item["content"]  # it follows its reasoning
            else:
                messages.append(message)
        elif kind == "function_call_output":
            messages.append(
                {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
            )
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            if kind == "reasoning":
                reasoning = item.get("content") or item.get("summary") or ""
                messages[-1]["reasoning"] = messages[-1].get("reasoning", "") + reasoning
            else:
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
    return messages


def chat_fields(asked: Mapping[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of the chat request that asks the same.

    Args:
      asked: the fields of the request.
      messages: of the conversation, the request's own included.

    Raises:
      ApiError: 400.
    """
    if asked.get("instructions"):
        messages = [{"role": "system", "content": asked["instructions"]}, *messages]
    chat: dict[str, Any] = {"messages": messages}
    for name in ("model", "temperature", "top_p", "parallel_tool_calls"):
        if name in asked:
            chat[name] = asked[name]
    if "max_output_tokens" in asked:
        chat["max_completion_tokens"] = asked["max_output_tokens"]
    if "effort" in asked.get("reasoning", {}):
        chat["reasoning_effort"] = asked["reasoning"]["effort"]
    if wants_logprobs(asked):
        chat |= {"logprobs": True, "top_logprobs": asked.get("top_logprobs", 0)}
    if "tools" in asked:
        chat["tools"] = [
            {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
            for tool in asked["tools"]
        ]
    choice = asked.get("tool_choice", "auto")
    if isinstance(choice, dict):
        choice = {"type": "function", "function": {"name": choice["name"]}}
    chat["tool_choice"] = choice
    form = asked.get("text", {}).get("format")
    if form is not None and form["type"] == "json_schema":
        parts = {name: value for name, value in form.items() if name != "type"}
        form = {"type": "json_schema", "json_schema": parts}
    if form is not None:
        chat["response_format"] = form
    return chat


def wants_logprobs(asked: Mapping[str, Any]) -> bool:
    """Whether the answer has log-probabilities."""
    return LOGPROBS in asked.get("include", ()) or "top_logprobs" in asked


def rename_params(error: ApiError) -> ApiError:
    """An error of the chat that stands for a request, with the request's own fields' names."""
    names = {
        "messages": "input",
        "max_completion_tokens": "max_output_tokens",
        "response_format": "text",
    }
    if error.param is not None:
        first, dot, rest = error.param.partition(".")
        error.param = names.get(first, first) + dot + rest
    return error
