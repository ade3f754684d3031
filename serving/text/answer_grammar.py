"""The grammar of a whole answer: reasoning first, then content of a form, or tool calls."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from serving.text.grammar import GrammarCompiler
from serving.text.parsers import hermes, think
from serving.text.syntax import Syntax
from serving.text.vocabulary import Vocabulary

_MOST_CALLS = 8  # in one answer
ANY_TEXT = "/(?s:.*)/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerForm:
    """What an answer may consist of.

    Args:
      content: Lark of the content, such as `%json {..}`; None: no content, only calls.
      text_before_calls: whether calls may follow the content.
      tools: that may be called; none: no calls.
      parallel: whether several calls may follow one another.
      thinking: whether the prompt ends inside of the reasoning.
    """

    content: str | None = None
    text_before_calls: bool = False
    tools: Sequence[Mapping[str, Any]] = ()
    parallel: bool = True
    thinking: bool = False


def answer_lark(
    compiler: GrammarCompiler, vocabulary: Vocabulary, syntax: Syntax, form: AnswerForm
) -> str:
    """The grammar of an answer, in llguidance's dialect of Lark.

    Raises:
      ValueError: the parameters of a tool are no schema that llguidance knows.
    """
    rules = [] if form.content is None else [f"content: {form.content}"]
    schemas = []
    for i, tool in enumerate(form.tools):
        field = f"tools[{i}].function.parameters"
        parameters = tool["function"].get("parameters") or {}
        if isinstance(parameters, dict):  # arguments are always an object
            parameters = {"type": "object", **parameters}
        schemas.append(compiler.check_schema(parameters, field))
    names = [tool["function"]["name"] for tool in form.tools]
    if syntax.name == "harmony":
        rules += _harmony(vocabulary, syntax, form, names, schemas)
    else:
        rules += _tagged(vocabulary, syntax, form, names, schemas)
    return "\n".join(rules)


def _harmony(
    vocabulary: Vocabulary,
    syntax: Syntax,
    form: AnswerForm,
    names: Sequence[str],
    schemas: Sequence[str],
) -> list[str]:
    channel, message = (_marker(vocabulary, one) for one in ("<|channel|>", "<|message|>"))
    end, start = (_marker(vocabulary, one) for one in ("<|end|>", "<|start|>"))
    rules = [
        f"start: analysis? ({_either(syntax, form)})",
        f'analysis: {channel} "analysis" {message} {ANY_TEXT} {end} {start} "assistant"',
        f'answer: {channel} "final" {message} content' if form.content is not None else "",
        f'preamble: {channel} "commentary" {message} content {end} {start} "assistant"'
        if form.text_before_calls
        else "",
        # A message that calls a function ends the answer, so there is one at most.
        f"calls: {' | '.join(f'call_{i}' for i in range(len(names)))}" if names else "",
    ]
    for i, (name, schema) in enumerate(zip(names, schemas, strict=True)):
        header = json.dumps(f"commentary to=functions.{name} ", ensure_ascii=False)
        constrain = vocabulary.markup.get("<|constrain|>")
        kind = f'<[{constrain}]> "json"' if constrain is not None else '"json"'
        rules += [f"call_{i}: {channel} {header} {kind} {message} arguments_{i}"]
        rules += [f"arguments_{i}: {schema}"]
    return [rule for rule in rules if rule]


def _tagged(
    vocabulary: Vocabulary,
    syntax: Syntax,
    form: AnswerForm,
    names: Sequence[str],
    schemas: Sequence[str],
) -> list[str]:
    """Of Hermes or Llama 3, with or without reasoning."""
    rules = ["answer: content"] if form.content is not None else []
    prefix = ""
    if syntax.thinks:
        opened = "" if form.thinking else f"{_marker(vocabulary, think.OPEN)} "
        prefix = f"({opened}reasoning gap){'' if form.thinking else '?'} "
        rules.append('gap: ("\\n" "\\n"?)?')
        close = vocabulary.markup.get(think.CLOSE)
        if close is None:
            rules.append(f"reasoning[suffix={json.dumps(think.CLOSE)}]: {ANY_TEXT}")
        else:
            rules.append(f"reasoning: {ANY_TEXT} <[{close}]>")
    rules.insert(0, f"start: {prefix}({_either(syntax, form)})")
    if not names:
        return rules
    # Where no token ends an answer, a second call would always follow.
    more = _MOST_CALLS - 1 if form.parallel and vocabulary.ends else 0
    between = '"\\n"' if syntax.name == "hermes" else '"; "'
    rules.append(f"calls: call ({between} call){{0,{more}}}" if more else "calls: call")
    anyone = " | ".join(f"call_{i}" for i in range(len(names)))
    if syntax.name == "hermes":
        begin, end = (_marker(vocabulary, one) for one in hermes.MARKERS)
        rules.append(f'call: {begin} "\\n" ({anyone}) "\\n" {end}')
    else:
        rules.append(f"call: {anyone}")
    key = "arguments" if syntax.name == "hermes" else "parameters"
    for i, (name, schema) in enumerate(zip(names, schemas, strict=True)):
        begun = json.dumps({"name": name}, ensure_ascii=False)[:-1] + f', "{key}": '
        rules += [f'call_{i}: {json.dumps(begun, ensure_ascii=False)} arguments_{i} "}}"']
        rules += [f"arguments_{i}: {schema}"]
    return rules


def takes_text_before_calls(vocabulary: Vocabulary, syntax: Syntax) -> bool:
    """Whether a grammar can tell calls from any text before them: by tokens of their own."""
    if syntax.name == "harmony":
        return True
    return syntax.name == "hermes" and hermes.OPEN in vocabulary.markup


def _either(syntax: Syntax, form: AnswerForm) -> str:
    kinds = ["answer"] if form.content is not None else []
    if not form.tools:
        return "answer"
    if not form.text_before_calls:
        return " | ".join([*kinds, "calls"])
    return "answer | preamble? calls" if syntax.name == "harmony" else "answer calls?"


def _marker(vocabulary: Vocabulary, marker: str) -> str:
    """A marker in Lark: its token, or its text where the vocabulary has no such token."""
    token = vocabulary.markup.get(marker)
    return json.dumps(marker) if token is None else f"<[{token}]>"
