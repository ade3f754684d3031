"""One request's way to the engine and back: its texts, what they cost, and why they ended."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Literal, NamedTuple, Protocol

from serving.request import Delta, SamplingParams, TokenLogprobs, Usage
from serving.text.answer import Answer, Written
from serving.text.parsers.parts import Arguments, Content, Part, Reasoning, ToolCall, merge

Reason = Literal["stop", "length", "tool_calls"]
_WAITING_PIECES = 8  # of the other choices while one is sent


class TokenSource(Protocol):
    """What the engine returns for a prompt; `serving.generation.Generation` is one."""

    @property
    def usage(self) -> Usage:
        """What it has taken so far."""

    def cancel(self) -> None:
        """Ends it; its slot is free within two steps."""

    def __aiter__(self) -> AsyncIterator[Delta]:
        """The tokens as they come."""


class Submitter(Protocol):
    """The part of the engine that makes texts."""

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> TokenSource:
        """Puts a prompt into the queue."""


class GenerationFailed(Exception):
    """The engine could not go on with a text, such as one whose logits are NaN."""


class GenerationCancelled(Exception):
    """The engine ended a text because the server is ending."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextRequest:
    """One text to make.

    Args:
      prompt: tokens.
      group: the number of the prompt in its request; texts of one prompt share its cost.
      params: for the engine.
      answer: reads the tokens of this text alone.
      is_empty: whether no token is wanted; the engine is asked for the likelihood of the prompt
        only, if for anything.
    """

    prompt: Sequence[int]
    group: int = 0
    params: SamplingParams
    answer: Answer
    is_empty: bool = False


class Chosen(NamedTuple):
    """A token of a text, and how likely it was if the request asks."""

    token: int
    logprobs: TokenLogprobs | None
    offset: int = 0  # characters of the content before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one text gets next."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    content: list[Chosen] = dataclasses.field(default_factory=list)  # the tokens of its content
    reasoning: list[Chosen] = dataclasses.field(default_factory=list)  # of its reasoning
    finish: Reason | None = None


class Choice:
    """One text, from its tokens to its parts."""

    def __init__(self, request: TextRequest, generation: TokenSource | None) -> None:
        self.request = request
        self.generation = generation
        self.tokens = 0
        self.finish: Reason | None = None
        self._answer = request.answer
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of its tokens but the first
        self._chosen: list[Chosen] = []

    @property
    def usage(self) -> Usage:
        """What the engine says that it took."""
        return self.generation.usage if self.generation is not None else Usage()

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens are reasoning."""
        return self._answer.reasoning_tokens

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The pieces as they come; the last one says why the text ended.

        Raises:
          GenerationFailed: the engine cannot go on.
          GenerationCancelled: the engine is ending.
        """
        if self.generation is None:
            self.finish = "length"
            yield Piece(finish="length")
            return
        try:
            async for delta in self.generation:
                yield self._take(delta)
                if self.finish is not None:
                    return
            raise GenerationFailed("the engine did not say why the text ended")
        finally:
            self.generation.cancel()

    def _take(self, delta: Delta) -> Piece:
        if delta.finish == "error":
            raise GenerationFailed(delta.error)
        if delta.finish == "cancelled":
            raise GenerationCancelled(delta.error or "the server is ending")
        piece = Piece()
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs
        if self.request.is_empty:
            self.finish = "length"
            return Piece(finish="length")
        for index, token in enumerate(delta.tokens):
            logprobs = delta.logprobs[index] if delta.logprobs else None
            self._chosen.append(Chosen(token, logprobs))
            self.tokens += 1
            self._write(piece, self._answer.feed((token,)))
            if self._answer.is_over:
                self.finish = "tool_calls" if self._answer.calls else "stop"
                break
        if self.finish is None and delta.finish is not None:
            self.finish = "length" if delta.finish == "length" else "stop"
            if self._answer.calls and self.finish == "stop":
                self.finish = "tool_calls"
        if self.finish is not None:
            self._write(piece, self._answer.finish())
        return dataclasses.replace(piece, parts=merge(piece.parts), finish=self.finish)

    def _write(self, piece: Piece, written: Written) -> None:
        piece.parts.extend(written.parts)
        for place in written.tokens:
            chosen = self._chosen[place.position]
            if place.channel == "content":
                piece.content.append(chosen._replace(offset=place.offset))
            elif place.channel == "reasoning":
                piece.reasoning.append(chosen)


class Session:
    """All the texts of one request.

    Args:
      engine: gets them all, or none.
      requests: one a text.

    Raises:
      QueueFull: the engine has no room for them.
      PromptTooLong: a prompt leaves no room in the context.
      ValueError: the engine does not take the parameters.
    """

    def __init__(self, engine: Submitter, requests: Sequence[TextRequest]) -> None:
        self.choices: list[Choice] = []
        try:
            for request in requests:
                is_asked = not request.is_empty or request.params.prompt_logprobs is not None
                generation = engine.submit(request.prompt, request.params) if is_asked else None
                self.choices.append(Choice(request, generation))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends all texts at once."""
        for choice in self.choices:
            if choice.generation is not None:
                choice.generation.cancel()

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all texts as they come, each with the number of its text."""
        if len(self.choices) == 1:
            async with contextlib.aclosing(self.choices[0].pieces()) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        queue: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_WAITING_PIECES)
        tasks = [
            asyncio.create_task(_forward(index, choice, queue))
            for index, choice in enumerate(self.choices)
        ]
        try:
            left = len(tasks)
            while left:
                index, found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                left -= found.finish is not None
                yield index, found
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, each counted once."""
        return sum({c.request.group: len(c.request.prompt) for c in self.choices}.values())

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that were in the cache before the request came."""
        cached: dict[int, int] = {}
        for choice in self.choices:  # a later choice of a prompt finds what the first one left
            group, tokens = choice.request.group, choice.usage.cached_tokens
            cached[group] = min(cached.get(group, tokens), tokens)
        return sum(cached.values())

    @property
    def completion_tokens(self) -> int:
        """Tokens made, over all texts."""
        return sum(choice.tokens for choice in self.choices)


async def _forward(
    index: int, choice: Choice, queue: "asyncio.Queue[tuple[int, Piece | Exception]]"
) -> None:
    try:
        async with contextlib.aclosing(choice.pieces()) as pieces:
            async for piece in pieces:
                await queue.put((index, piece))
    except Exception as error:
        await queue.put((index, error))


def join(pieces: Sequence[Piece]) -> tuple[str, str, list[dict[str, str]]]:
    """The content, the reasoning and the tool calls of a text's pieces."""
    content, reasoning = [], []
    calls: dict[int, dict[str, str]] = {}
    for part in (part for piece in pieces for part in piece.parts):
        match part:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCall(index, id, name):
                calls[index] = {"id": id, "name": name, "arguments": ""}
            case Arguments(index, text):
                calls[index]["arguments"] += text
    return "".join(content), "".join(reasoning), [calls[index] for index in sorted(calls)]
