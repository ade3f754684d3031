"""Everything about the text of one model: prompts, answers and grammars."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.text.tokenizer import Tokenizer
from serving.text.answer import Answer
from serving.text.answer_grammar import ANY_TEXT, AnswerForm, answer_lark, takes_text_before_calls
from serving.text.grammar import MOST_LARK, Grammar, GrammarCompiler, regex_rule
from serving.text.parsers.parser import Markup, Parser
from serving.text.parsers.plain import PlainReader
from serving.text.prompts import Prompt, ReasoningOptions, write_prompt
from serving.text.syntax import choose_parser, find_syntax
from serving.text.vocabulary import Vocabulary


class ModelText:
    """Turns requests into tokens and tokens into answers; make one for each model.

    All methods may be called from any thread.

    Args:
      tokenizer: of the model.
      vocab: size of the model's vocabulary.
      family: of the model's config.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab: int, family: str = "") -> None:
        templates = [tokenizer.template or "", *tokenizer.templates.values()]
        self.tokenizer = tokenizer
        self.vocab = vocab
        self.vocabulary = Vocabulary(tokenizer, templates)
        self._compiler = GrammarCompiler(self.vocabulary)
        template = tokenizer.template or tokenizer.templates.get("default")
        self.syntax = find_syntax(
            self.vocabulary, tokenizer.templates.get("tool_use", template), family
        )

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer, for `SamplingParams.stop_tokens`."""
        return tuple(token for token in self.tokenizer.ends if token < self.vocab)

    @property
    def reasons(self) -> bool:
        """Whether the model may reason before it answers."""
        return self.syntax.thinks or self.syntax.name == "harmony"

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        reasoning: ReasoningOptions | None = None,
    ) -> Prompt:
        """The prompt of a chat; see `serving.text.prompts.write_prompt`."""
        return write_prompt(
            self.vocabulary, self.syntax, messages, tools=tools, reasoning=reasoning
        )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a bare prompt, in which the spelling of a special token is that token.

        Args:
          text: the prompt.
          special: whether to add the tokens that begin and end a text.

        Raises:
          ValueError: the text has half a surrogate pair, or a character that has no token.
        """
        return self.tokenizer.encode(text, special=special)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return self.tokenizer.decode(tokens)

    def token_text(self, token: int) -> str:
        r"""A token for `logprobs`: its text; bytes that are no whole characters as `\xe2`."""
        return self.vocabulary.text_of(token)

    def token_bytes(self, token: int) -> list[int]:
        """The bytes of a token for `logprobs`."""
        return list(self.vocabulary.bytes_of(token))

    def answer(
        self,
        prompt: Prompt,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        parallel_calls: bool = True,
        raw_reasoning: bool = False,
    ) -> Answer:
        """Takes the tokens of one answer to a chat; make one for each choice.

        Args:
          prompt: what `chat` gave.
          tools: the client's; none if tool_choice is "none".
          stops: stop strings.
          min_tokens: before so many, no stop string ends the answer.
          parallel_calls: whether more than one tool may be called.
          raw_reasoning: whether reasoning is part of the content.
        """
        names = tuple(tool["function"]["name"] for tool in tools)
        parser = choose_parser(
            self.vocabulary,
            self.syntax,
            tools=names,
            thinking=prompt.thinking,
            raw=raw_reasoning,
        )
        return Answer(parser, stops, min_tokens=min_tokens, parallel_calls=parallel_calls)

    def grammar(
        self,
        prompt: Prompt,
        *,
        schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        tool_choice: str = "auto",
        parallel_calls: bool = True,
    ) -> Grammar | None:
        """The grammar of an answer to a chat; None if any text will do.

        The grammar allows reasoning before the answer, as the model's syntax has it. Arguments of
        calls follow the tools' schemas if `tool_choice` asks for calls; or if a tool is `strict`
        and tokens of their own mark calls (Qwen3, gpt-oss). Compiling may take some tenths of a
        second: call it outside of an event loop.

        Args:
          prompt: what `chat` gave.
          schema: of response_format json_schema; for json_object, `{"type": "object"}`.
          regex: a regular expression of the whole content, in place of `schema`.
          tools: the client's.
          tool_choice: "none", "auto", "required", or the name of the one tool to call.
          parallel_calls: whether more than one tool may be called.

        Raises:
          ValueError: a schema or the regular expression is too long, too deep, or uses what
            llguidance does not know; `tool_choice` names no tool.
        """
        named = tool_choice not in ("none", "auto", "required")
        if named:
            tools = [tool for tool in tools if tool["function"]["name"] == tool_choice]
        if (named or tool_choice == "required") and not tools:
            raise ValueError(f"tool_choice is {tool_choice!r}; no tool of this request will do")
        content, before_calls = None, False
        if schema is not None:
            content = self._compiler.check_schema(dict(schema), "response_format")
        elif regex is not None:
            content = regex_rule(regex, "regex")
        if named or tool_choice == "required":
            content = None
        elif content is None:
            if tool_choice == "none" or not self._is_strict(tools):
                return None
            content, before_calls = ANY_TEXT, True
        form = AnswerForm(
            content=content,
            text_before_calls=before_calls,
            tools=() if tool_choice == "none" else tools,
            parallel=parallel_calls and not named,
            thinking=prompt.thinking,
        )
        lark = answer_lark(self._compiler, self.vocabulary, self.syntax, form)
        return self._compiler.compile(lark)

    def _is_strict(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether one of the tools asks for arguments of its schema, and a grammar can do that."""
        strict = any(tool["function"].get("strict") for tool in tools)
        return strict and takes_text_before_calls(self.vocabulary, self.syntax)

    def bare_grammar(
        self, *, schema: Mapping[str, Any] | None = None, regex: str | None = None, lark: str = ""
    ) -> Grammar:
        """The grammar of a completion, without markup: give one of the three.

        Raises:
          ValueError: as `grammar`.
        """
        if schema is not None:
            return self._compiler.compile(
                f"start: {self._compiler.check_schema(dict(schema), 'schema')}"
            )
        if regex is not None:
            return self._compiler.compile(f"start: {regex_rule(regex, 'regex')}")
        if len(lark) > MOST_LARK:
            raise ValueError(f"the grammar has {len(lark):,} characters; {MOST_LARK:,} is the most")
        return self._compiler.compile(lark)

    def completion(self, stops: Sequence[str] = (), *, min_tokens: int = 0) -> Answer:
        """Takes the tokens that go on from a bare prompt: everything is content."""
        parser = Parser(Markup(self.vocabulary, ()), PlainReader())
        return Answer(parser, stops, min_tokens=min_tokens)
