"""From the messages of a chat to the tokens of its prompt.

What clients write stays text: a user's "<|im_end|>" ends no turn, although the template's does.
"""

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from serving.text.parsers import hermes, think
from serving.text.syntax import Syntax, template_of
from serving.text.vocabulary import Vocabulary

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
# One of these characters stands for each spelling of markup in a client's text.
_FIRST_SENTINEL, _LAST_SENTINEL = 0xF0000, 0xFFFFD
_SENTINELS = f"{chr(_FIRST_SENTINEL)}-{chr(_LAST_SENTINEL)}"
_REASONING = ("reasoning", "reasoning_content", "thinking")
_TOOLS = """You may call functions. Their signatures, as JSON schemas, are:
<tools>
{tools}
</tools>
For each call, write a JSON object with the function's name and its arguments:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A chat, as tokens.

    Args:
      tokens: of the whole chat, up to where the answer begins.
      thinking: whether the answer begins inside of the model's reasoning.
    """

    tokens: list[int]
    thinking: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningOptions:
    """What a request says of the model's reasoning; None leaves it to the template.

    Args:
      effort: how much; "none" asks for an answer without reasoning.
      clear: whether the reasoning of messages before the last user's is left out.
    """

    effort: Effort | None = None
    clear: bool | None = None


def write_prompt(
    vocabulary: Vocabulary,
    syntax: Syntax,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    reasoning: ReasoningOptions | None = None,
) -> Prompt:
    """The prompt that asks for the next message of a chat.

    Without a chat template, each message is a line `role: content`, and the last line is
    `assistant:`. A template that knows no tools is given them as text, in Hermes' syntax.

    Args:
      vocabulary: of the model's tokenizer.
      syntax: of the model.
      messages: with `role` (system, developer, user, assistant or tool) and `content` (a text, or
        None), and where a role has them `reasoning`, `tool_calls`, `tool_call_id` and `name`.
      tools: the client's tools, as the API has them: {"type": "function", "function": {...}}.
      reasoning: what the request says of it.

    Raises:
      ValueError: the template refuses the messages, or fails.
    """
    tokenizer = vocabulary.tokenizer
    template = template_of(tokenizer, bool(tools))
    reasoning = reasoning or ReasoningOptions()
    chat = [_prepared(message, template) for message in messages]
    if reasoning.clear:
        _clear_reasoning(chat)
    marking = Marking(vocabulary)
    chat, known = [marking.mark_message(message) for message in chat], marking.mark(list(tools))
    if not syntax.tools_in_template or template is None:
        chat, known = _spell_tools(chat, known), []
    elif syntax.name != "hermes":
        chat = _one_call_each(chat)
    if syntax.name == "harmony":
        chat, known = _for_harmony(chat), [_described(tool) for tool in known]
    if template is None:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in chat)
        text += "assistant:"
        return Prompt(tokens=marking.encode(text, special=True))
    text = tokenizer.chat_text(
        chat,
        tools=known or None,
        chat_template=template,
        **_template_options(template, syntax, reasoning),
    )
    thinking = syntax.thinks and text.rstrip().endswith(think.OPEN)
    return Prompt(tokens=marking.encode(text, special=False), thinking=thinking)


class Marking:
    """Keeps the spellings of special tokens in clients' texts from becoming these tokens.

    Before the template is rendered, each spelling becomes one character of private use; after it,
    the text around these characters is encoded as usual, and the spellings as plain text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pattern, self._unthinking = _patterns(tuple(vocabulary.markup))
        self._sentinels: dict[str, str] = {}  # of a spelling

    def mark(self, value: Any) -> Any:
        """A JSON value whose texts, keys included, spell no special token any more."""
        return self._mark(value, self._pattern)

    def mark_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message, marked; templates look for an assistant's `<think>` in its content."""
        pattern = self._unthinking if message["role"] == "assistant" else self._pattern
        return {
            key: self._mark(value, pattern if key == "content" else self._pattern)
            for key, value in message.items()
        }

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a rendered text; `special` adds the tokens that begin and end a text."""
        tokenizer = self._vocabulary.tokenizer
        if not self._sentinels:
            return tokenizer.encode(text, special=special)
        spellings = {sentinel: spelling for spelling, sentinel in self._sentinels.items()}
        pieces = re.split(f"([{''.join(spellings)}])", text)
        plain = {one: self._encode_plain(spelling) for one, spelling in spellings.items()}
        tokens = tokenizer.encode(pieces[0], special=special)
        for sentinel, piece in zip(pieces[1::2], pieces[2::2], strict=True):
            tokens += plain[sentinel]
            tokens += self._vocabulary.encode_after(piece)
        return tokens

    def _mark(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(self._sentinel, value)
        if isinstance(value, Mapping):
            return {self._mark(k, pattern): self._mark(v, pattern) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(one, pattern) for one in value]
        return value

    def _sentinel(self, match: re.Match[str]) -> str:
        count = len(self._sentinels)
        if count > _LAST_SENTINEL - _FIRST_SENTINEL:
            raise ValueError("messages have too many characters of private use (U+F0000 on)")
        return self._sentinels.setdefault(match[0], chr(_FIRST_SENTINEL + count))

    def _encode_plain(self, text: str) -> list[int]:
        """The tokens of a text, none of them markup: it is cut inside of each spelling."""
        tokens: list[int] = []
        place = 0
        while match := self._pattern.search(text, place):
            cut = match.start() + 1
            tokens += self._vocabulary.encode_after(text[place:cut])
            place = cut
        tokens += self._vocabulary.encode_after(text[place:])
        return [token for token in tokens if token not in self._vocabulary.special]


@functools.lru_cache(maxsize=16)
def _patterns(spellings: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Finds all spellings, and all but those of the markers of reasoning."""
    return _pattern(spellings), _pattern([s for s in spellings if s not in think.MARKERS])


def _pattern(spellings: Sequence[str]) -> re.Pattern[str]:
    # The sentinels themselves are marked too: they may be in a client's text.
    return re.compile(f"{_alternatives(sorted(set(spellings)))}|[{_SENTINELS}]")


def _alternatives(spellings: list[str]) -> str:
    """A regular expression of sorted spellings that tries the longest first.

    Spellings that begin alike are one branch, so that a text of many beginnings takes no longer.
    """
    if not spellings:
        return "(?!)"
    branches = []
    for first, group in itertools.groupby(spellings, key=lambda spelling: spelling[:1]):
        alike = list(group)
        if not first:
            continue
        shared = os.path.commonprefix(alike)
        rest = [spelling[len(shared) :] for spelling in alike]
        branches.append(re.escape(shared) + (_alternatives(rest) if any(rest) else ""))
    joined = f"(?:{'|'.join(branches)})"
    return f"{joined}?" if not spellings[0] else joined


def _prepared(message: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    """A message as templates of Hugging Face expect it."""
    prepared = {key: value for key, value in message.items() if value is not None}
    prepared.setdefault("content", "")
    if prepared["role"] == "developer" and "developer" not in (template or ""):
        prepared["role"] = "system"
    if calls := prepared.get("tool_calls"):
        prepared["tool_calls"] = [_with_object(call) for call in calls]
    else:
        prepared.pop("tool_calls", None)  # templates ask whether it is there
    return prepared


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object, where their text is one."""
    function = dict(call["function"])
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        function["arguments"] = arguments
    return {**call, "function": function}


def _clear_reasoning(chat: list[dict[str, Any]]) -> None:
    """Takes the reasoning out of the messages before the last user's."""
    users = [i for i, message in enumerate(chat) if message["role"] == "user"]
    for message in chat[: users[-1] if users else 0]:
        for name in _REASONING:
            message.pop(name, None)


def _spell_tools(
    chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The chat with its tools, calls and results written as text, for templates without them."""
    spelled = [_spell_message(message) for message in chat]
    if not tools:
        return spelled
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _TOOLS.format(tools=schemas)
    if spelled and spelled[0]["role"] in ("system", "developer"):
        first = spelled[0]
        return [{**first, "content": f"{first['content']}\n\n{text}".strip()}, *spelled[1:]]
    return [{"role": "system", "content": text}, *spelled]


def _spell_message(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        result = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": result}
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        written = {"name": function["name"], "arguments": function["arguments"]}
        text = json.dumps(written, ensure_ascii=False)
        calls.append(f"{hermes.OPEN}\n{text}\n{hermes.CLOSE}")
    content = "\n".join(filter(None, [message["content"], *calls]))
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": content}


def _one_call_each(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat with each call in a message of its own, its result right behind it.

    Templates of Llama 3 refuse several calls in a message; that of gpt-oss drops all but one.
    """
    divided: list[dict[str, Any]] = []
    rest = list(chat)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            divided.append(message)
            continue
        results = []
        while rest and rest[0]["role"] == "tool":
            results.append(rest.pop(0))
        for i, call in enumerate(calls):
            first = message if i == 0 else {"role": "assistant", "content": ""}
            divided.append({**first, "tool_calls": [call]})
            id = call.get("id")
            divided += [one for one in results if one.get("tool_call_id") == id]
            results = [one for one in results if one.get("tool_call_id") != id]
        divided += results
    return divided


def _for_harmony(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The chat as gpt-oss's template takes it, which refuses or drops what it does not expect."""
    instructions = [m for m in chat if m["role"] in ("system", "developer")]
    others = [dict(m) for m in chat if m["role"] not in ("system", "developer")]
    for message in others:
        reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
        if "tool_calls" in message and message["content"] and reasoning is not None:
            for name in _REASONING:
                message.pop(name, None)
            message["content"] = f"{reasoning}\n\n{message['content']}"
    if not instructions:
        return others
    content = "\n\n".join(message["content"] for message in instructions)
    return [{"role": instructions[0]["role"], "content": content}, *others]


def _described(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with a description, which gpt-oss's template fails without."""
    function = tool["function"]
    return {**tool, "function": {**function, "description": function.get("description") or ""}}


def _template_options(template: str, syntax: Syntax, reasoning: ReasoningOptions) -> dict[str, Any]:
    """The template's variables for reasoning, as far as it knows them."""
    options: dict[str, Any] = {}
    effort = reasoning.effort
    if effort is not None:
        for name in ("enable_thinking", "thinking"):
            options[name] = effort != "none"
        # gpt-oss always reasons; it knows three levels.
        levels = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
        level = levels.get(effort, effort) if syntax.name == "harmony" else effort
        options["reasoning_effort"] = level
    if reasoning.clear is not None:
        options["clear_thinking"] = reasoning.clear
    return {name: value for name, value in options.items() if re.search(rf"\b{name}\b", template)}
