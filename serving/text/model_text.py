"""Everything about the text of one model: prompts, answers and grammars."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.text.tokenizer import Tokenizer
from serving.text.answer import Answer
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
        parallel_calls: bool = True,
        raw_reasoning: bool = False,
    ) -> Answer:
        """Takes the tokens of one answer to a chat; make one for each choice.

        Args:
          prompt: what `chat` gave.
          tools: the client's; none if tool_choice is "none".
          stops: stop strings.
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
        return Answer(parser, stops, parallel_calls=parallel_calls)

    def completion(self, stops: Sequence[str] = ()) -> Answer:
        """Takes the tokens that go on from a bare prompt: everything is content."""
        return Answer(Parser(Markup(self.vocabulary, ()), PlainReader()), stops)
