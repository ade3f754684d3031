"""From a chat request to the texts that the engine is asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from serving.api.errors import ApiError, refuse
from serving.api.json_schemas import check_strict
from serving.api.registry import Served
from serving.api.sampling import find_room, make_params
from serving.session import TextRequest
from serving.text.grammar import Grammar
from serving.text.prompts import Prompt, ReasoningOptions

Tool = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatJob:
    """A chat request, ready for the engine.

    Args:
      texts: one for each choice.
      fields: of the request, checked.
      shows_reasoning: whether the answer has the reasoning.
      is_raw: whether reasoning is part of the content.
    """

    texts: list[TextRequest]
    fields: Mapping[str, Any]
    shows_reasoning: bool
    is_raw: bool


def prepare_chat(
    fields: Mapping[str, Any], served: Served, *, most_choices: int, strict_rules: bool = True
) -> ChatJob:
    """Renders the messages, makes the grammar, and says what the engine is asked.

    This takes time: call it in a thread.

    Args:
      fields: of the request, checked one by one.
      served: the model.
      most_choices: that one request may have.
      strict_rules: whether a strict schema must close every object.

    Raises:
      ApiError: 400.
    """
    _check_together(fields, most_choices)
    if strict_rules:
        _check_strict(fields)
    tools = _tools(fields)
    text, card = served.text, served.card
    effort: Any = "none" if fields.get("disable_reasoning") else fields.get("reasoning_effort")
    reasoning = ReasoningOptions(effort=effort, clear=fields.get("clear_thinking"))
    try:
        prompt = text.chat(fields["messages"], tools=tools, reasoning=reasoning)
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_messages", "messages") from error
    room = find_room(fields, prompt.tokens, card.context, "messages")
    grammar = _grammar(fields, served, prompt, tools)
    prediction = _prediction(fields, served)
    layout = fields.get("reasoning_format", "none")
    texts = [
        TextRequest(
            prompt=prompt.tokens,
            params=make_params(
                fields,
                room,
                vocab=text.vocab,
                choice=choice,
                stop_tokens=text.stop_tokens,
                logprobs=fields.get("top_logprobs", 0) if fields.get("logprobs") else None,
                matcher=None if grammar is None else grammar.matcher(),
                prediction=prediction,
            ),
            answer=text.answer(
                prompt,
                tools=tools,
                stops=fields.get("stop", ()),
                min_tokens=room.least,
                parallel_calls=_is_parallel(fields),
                raw_reasoning=layout == "raw",
            ),
            is_empty=room.most == 0,
        )
        for choice in range(fields.get("n", 1))
    ]
    return ChatJob(
        texts=texts, fields=fields, shows_reasoning=layout != "hidden", is_raw=layout == "raw"
    )


def _check_together(fields: Mapping[str, Any], most_choices: int) -> None:
    """Checks fields that depend on each other."""
    if "top_logprobs" in fields and not fields.get("logprobs"):
        refuse("top_logprobs", "top_logprobs needs logprobs: true")
    if "stream_options" in fields and not fields.get("stream"):
        refuse("stream_options", "stream_options needs stream: true")
    if fields.get("n", 1) > most_choices:
        refuse("n", f"n is {fields['n']}; this server makes {most_choices} texts at most")
    choice = fields.get("tool_choice", "auto")
    names = [tool["function"]["name"] for tool in fields.get("tools", ())]
    if choice == "required" and not names:
        refuse("tool_choice", "tool_choice is required, and there are no tools")
    if isinstance(choice, dict) and (name := choice["function"]["name"]) not in names:
        refuse("tool_choice", f"tool_choice names {name!r}, which is none of the tools")
    if len(set(names)) < len(names):
        refuse("tools", "two tools have the same name")


def _check_strict(fields: Mapping[str, Any]) -> None:
    form = fields.get("response_format", {}).get("json_schema", {})
    if form.get("strict") and "schema" in form:
        check_strict(form["schema"], "response_format.json_schema.schema")
    for place, tool in enumerate(fields.get("tools", ())):
        function = tool["function"]
        if function.get("strict") and "parameters" in function:
            check_strict(function["parameters"], f"tools[{place}].function.parameters")


def _tools(fields: Mapping[str, Any]) -> list[Tool]:
    """The tools that may be called."""
    return [] if fields.get("tool_choice") == "none" else fields.get("tools", [])


def _is_parallel(fields: Mapping[str, Any]) -> bool:
    """Whether one answer may call more than one tool; a tool that is named is called once."""
    is_named = isinstance(fields.get("tool_choice"), dict)
    return fields.get("parallel_tool_calls", True) and not is_named


def _grammar(
    fields: Mapping[str, Any], served: Served, prompt: Prompt, tools: list[Tool]
) -> Grammar | None:
    """The grammar that the request asks for, of which each text gets a matcher; None: any text."""
    form = fields.get("response_format", {"type": "text"})
    schema = None
    if form["type"] != "text":
        schema = form.get("json_schema", {}).get("schema", {"type": "object"})
    choice = fields.get("tool_choice", "auto")
    if isinstance(choice, dict):
        name, choice = choice["function"]["name"], "required"
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    try:
        return served.text.grammar(
            prompt,
            schema=schema,
            tools=tools,
            tool_choice=choice,
            parallel_calls=_is_parallel(fields),
        )
    except ValueError as error:
        param = "tools" if str(error).startswith("tools") else "response_format"
        raise ApiError(400, str(error), "wrong_schema", param) from error


def _prediction(fields: Mapping[str, Any], served: Served) -> tuple[int, ...]:
    if "prediction" not in fields:
        return ()
    try:
        return tuple(served.text.encode(fields["prediction"]["content"], special=False))
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_prediction", "prediction") from error
