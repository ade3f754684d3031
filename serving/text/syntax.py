"""Which markup a model writes, and what its chat template knows."""

import dataclasses
from typing import Literal

from models.text.tokenizer import Tokenizer
from serving.text.parsers import harmony, hermes, llama3, think
from serving.text.parsers.parser import Markup, Parser
from serving.text.parsers.parts import Reader
from serving.text.parsers.plain import PlainReader
from serving.text.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Syntax:
    """The markup of a model's answers.

    Args:
      name: how tools are called.
      thinks: whether answers may begin with reasoning between `<think>` and `</think>`.
      tools_in_template: whether the chat template writes tools, their calls and results.
    """

    name: Literal["harmony", "hermes", "llama3"]
    thinks: bool = False
    tools_in_template: bool = False


def find_syntax(vocabulary: Vocabulary, template: str | None, family: str) -> Syntax:
    """The syntax of a model.

    Models whose template knows no tools are asked to write Hermes' syntax.

    Args:
      vocabulary: of the model's tokenizer.
      template: its chat template, if it has one.
      family: of the model's config.
    """
    template = template or ""
    markup = vocabulary.markup
    harmonic = all(marker in markup for marker in ("<|start|>", "<|channel|>", "<|message|>"))
    if harmonic and (family == "gpt_oss" or "<|channel|>" in template):
        return Syntax(name="harmony", tools_in_template="tools" in template)
    thinks = think.CLOSE in template or think.CLOSE in markup
    if "tools" not in template:
        return Syntax(name="hermes", thinks=thinks)
    # A template of Llama 3 asks for {"name": .., "parameters": ..}, without a tag of Hermes.
    if hermes.OPEN not in template and (llama3.TAG in markup or '"parameters"' in template):
        return Syntax(name="llama3", thinks=thinks, tools_in_template=True)
    return Syntax(name="hermes", thinks=thinks, tools_in_template=True)


def choose_parser(
    vocabulary: Vocabulary,
    syntax: Syntax,
    *,
    tools: tuple[str, ...] = (),
    thinking: bool = False,
    raw: bool = False,
) -> Parser:
    """A parser for one answer.

    Args:
      vocabulary: of the model's tokenizer.
      syntax: of the model.
      tools: names of the tools that may be called; without any, calls are content.
      thinking: whether the prompt ends inside of the reasoning.
      raw: whether reasoning is content, with its `<think>` and `</think>`.
    """
    if syntax.name == "harmony":
        reader: Reader = harmony.HarmonyReader(tools=bool(tools))
        return Parser(Markup(vocabulary, harmony.MARKERS), reader)
    markers: tuple[str, ...] = ()
    reader = PlainReader()
    if tools and syntax.name == "llama3":
        reader, markers = llama3.Llama3Reader(tools), llama3.MARKERS
    elif tools:
        reader, markers = hermes.HermesReader(), hermes.MARKERS
    if syntax.thinks:
        reader = think.ThinkReader(reader, opened=thinking, raw=raw)
        markers += think.MARKERS
    return Parser(Markup(vocabulary, markers), reader)


def template_of(tokenizer: Tokenizer, tools: bool) -> str | None:
    """The template that `Tokenizer.chat` takes, with tools or without; None if there is none."""
    if tools and "tool_use" in tokenizer.templates:
        return tokenizer.templates["tool_use"]
    return tokenizer.template or tokenizer.templates.get("default")
