"""The fields of each request, with their ranges; no other field is taken.

The ranges are those of Cerebras' published OpenAPI document of July 2026. Fields of OpenAI alone
are no part of it and are refused by name.
"""

from typing import Any

from serving.api import schema
from serving.api.errors import refuse, shown
from serving.api.json_schemas import check_schema
from serving.request import MOST_BIASES, MOST_LOGPROBS

_LONGEST = 8_000_000  # characters of one text; a body has a limit of its own
_MOST_TOKENS = 10_000_000
_MOST_MESSAGES = 10_000
_MOST_TOOLS = 128
_MOST_STOPS, _LONGEST_STOP = 4, 1000
MOST_PROMPTS = 64

_text = schema.text(_LONGEST)
_name = schema.text(64, least=1, pattern="[a-zA-Z0-9_-]+")
_tokens = schema.whole(-1, _MOST_TOKENS)


def _biases(value: Any, name: str) -> dict[int, float]:
    """Checks `logit_bias`: token numbers, as texts, and what is added to their logits."""
    if not isinstance(value, dict):
        refuse(name, f"{name} is {shown(value)}; it must be an object")
    if len(value) > MOST_BIASES:
        refuse(name, f"{name} has {len(value):,} tokens; {MOST_BIASES} is the most")
    bias = schema.number(-100, 100)
    biases = {}
    for token, one in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            refuse(name, f"{name} has {shown(token)}; its names must be numbers of tokens")
        biases[int(token)] = bias(one, f"{name}.{token}")
    return biases


_stops = schema.several(schema.text(_LONGEST_STOP, least=1), 0, _MOST_STOPS)
_EXTRA = schema.record(
    {
        "top_k": schema.whole(1, _MOST_TOKENS),
        "min_p": schema.number(0, 1),
        "repetition_penalty": schema.number(0.01, 100),
    }
)
_SHARED = {
    "model": schema.text(500, least=1),
    "temperature": schema.number(0, 2),
    "top_p": schema.number(0, 1),
    "frequency_penalty": schema.number(-2, 2),
    "presence_penalty": schema.number(-2, 2),
    "logit_bias": _biases,
    "n": schema.whole(1, 128),
    "seed": schema.whole(-(2**63), 2**64 - 1),
    "stop": schema.either(
        lambda value, name: [schema.text(_LONGEST_STOP, least=1)(value, name)], _stops
    ),
    "max_tokens": _tokens,
    "min_tokens": _tokens,
    "stream": schema.flag,
    "stream_options": schema.record({"include_usage": schema.flag}),
    "reasoning_format": schema.one_of("none", "parsed", "text_parsed", "raw", "hidden"),
    "prompt_cache_key": schema.text(1024),
    "user": schema.text(1024),
}


def _eyeless(value: Any, name: str) -> None:
    kind = value["type"]
    refuse(name, f"{name} is of the type {kind!r}: the model reads text alone; send text parts")


_part = schema.record({"type": schema.constant("text"), "text": _text}, ("type", "text"))
_MEDIA = ("image_url", "image", "input_image", "input_audio", "audio", "file", "video_url")
_parts = schema.several(
    schema.by_field("type", {"text": _part} | dict.fromkeys(_MEDIA, _eyeless)), 1, 1000
)


def _content(value: Any, name: str) -> str:
    """A text, or parts, which are joined."""
    if isinstance(value, str):
        return _text(value, name)
    return "".join(part["text"] for part in _parts(value, name))


_call = schema.record(
    {
        "id": schema.text(200),
        "type": schema.constant("function"),
        "function": schema.record({"name": _name, "arguments": _text}, ("name", "arguments")),
        "index": schema.whole(0, 1000),
    },
    ("id", "type", "function"),
)
_SAID = {"role": schema.anything, "content": _content, "name": schema.text(200)}
_message = schema.by_field(
    "role",
    {
        **{role: schema.record(_SAID, ("content",)) for role in ("system", "developer", "user")},
        "assistant": schema.record(
            _SAID
            | {
                "reasoning": _content,
                "tool_calls": schema.several(_call, 0, _MOST_TOOLS),
                # OpenAI's client has these, all null, when it dumps a message to send it again.
                **dict.fromkeys(("refusal", "audio", "function_call"), schema.nothing),
                "annotations": schema.several(schema.nothing, 0, 0),
            }
        ),
        "tool": schema.record(
            _SAID | {"tool_call_id": schema.text(200)}, ("content", "tool_call_id")
        ),
    },
)
_FUNCTION = {
    "name": _name,
    "description": _text,
    "parameters": check_schema,
    "strict": schema.flag,
}
_FORMAT = {
    "name": _name,
    "description": _text,
    "schema": check_schema,
    "strict": schema.flag,
}
_choice = schema.one_of("none", "auto", "required")
EFFORTS = ("none", "low", "medium", "high")

chat = schema.record(
    _SHARED
    | {
        "messages": schema.several(_message, 1, _MOST_MESSAGES),
        "clear_thinking": schema.flag,
        "disable_reasoning": schema.flag,
        "logprobs": schema.flag,
        "top_logprobs": schema.whole(0, MOST_LOGPROBS),
        "max_completion_tokens": _tokens,
        "min_completion_tokens": _tokens,
        "model_parameters": _EXTRA,
        "parallel_tool_calls": schema.flag,
        "prediction": schema.record(
            {"type": schema.constant("content"), "content": _content}, ("type", "content")
        ),
        "reasoning_effort": schema.one_of(*EFFORTS),
        "response_format": schema.by_field(
            "type",
            {
                "text": schema.record({"type": schema.anything}),
                "json_object": schema.record({"type": schema.anything}),
                "json_schema": schema.record(
                    {
                        "type": schema.anything,
                        "json_schema": schema.record(_FORMAT, ("name",)),
                    },
                    ("json_schema",),
                ),
            },
        ),
        "service_tier": schema.one_of("auto", "default", "flex", "priority"),
        "tool_choice": schema.either(
            _choice,
            schema.record(
                {
                    "type": schema.constant("function"),
                    "function": schema.record({"name": _name}, ("name",)),
                },
                ("type", "function"),
            ),
        ),
        "tools": schema.several(
            schema.record(
                {
                    "type": schema.constant("function"),
                    "function": schema.record(_FUNCTION, ("name",)),
                },
                ("type", "function"),
            ),
            0,
            _MOST_TOOLS,
        ),
    },
    ("model", "messages"),
)


def _prompts(value: Any, name: str) -> list[Any]:
    """A list of prompts: texts, or lists of tokens."""
    if isinstance(value, str):
        return [_text(value, name)]
    token = schema.whole(0, 2**31 - 1)
    if isinstance(value, list) and value and isinstance(value[0], str):
        return schema.several(_text, 1, MOST_PROMPTS)(value, name)
    if isinstance(value, list) and value and isinstance(value[0], list):
        return schema.several(schema.several(token, 1, _MOST_TOKENS), 1, MOST_PROMPTS)(value, name)
    return [schema.several(token, 1, _MOST_TOKENS)(value, name)]


completions = schema.record(
    _SHARED
    | {
        "prompt": _prompts,
        "best_of": schema.whole(0, 20),
        "echo": schema.flag,
        "logprobs": schema.whole(0, MOST_LOGPROBS),
        "return_raw_tokens": schema.flag,
        "grammar_root": schema.nothing,
        "suffix": schema.nothing,
    },
    ("model", "prompt"),
)
