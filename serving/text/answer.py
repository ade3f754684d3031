"""One answer as it is generated: tokens in, parts of a message out."""

from collections.abc import Sequence
from typing import NamedTuple

from serving.text.parsers.parser import Parser
from serving.text.parsers.parts import Arguments, Channel, Content, Part, ToolCall, merge
from serving.text.stops import StopStrings


class TokenPlace(NamedTuple):
    """Where a token of an answer belongs."""

    position: int  # among all tokens fed, from 0
    channel: Channel
    offset: int  # characters of the content before it


class Written(NamedTuple):
    """What can be sent to the client now."""

    parts: list[Part]
    # Those whose text is in the parts: no markup, and nothing after a stop string.
    tokens: list[TokenPlace]


class Answer:
    """The parts of one answer, and where it ends.

    Feed the tokens of each `Delta`, then call `finish`. Stop strings are looked for in the content
    alone, neither in reasoning nor in tool calls.

    Args:
      parser: of the model's markup.
      stops: stop strings.
      min_tokens: a stop string that ends in one of so many first tokens does not count.
      parallel_calls: whether more than one tool may be called.
    """

    def __init__(
        self,
        parser: Parser,
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        parallel_calls: bool = True,
    ) -> None:
        self._parser = parser
        self._stops = StopStrings(stops)
        self._min_tokens, self._parallel_calls = min_tokens, parallel_calls
        self._tokens = 0
        self._given = self._written = 0  # characters of content to the stop strings, and from them
        self._held: list[tuple[TokenPlace, int]] = []  # with the content's length after each
        self.calls = 0  # tool calls that have begun
        self.is_over = False  # nothing more will come: cancel the generation

    @property
    def stop(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.matched

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens are reasoning."""
        return self._parser.reasoning_tokens

    def feed(self, tokens: Sequence[int]) -> Written:
        """What the tokens add. After the end, nothing."""
        parts: list[Part] = []
        for token in tokens:
            if self.is_over:
                break
            before = self._given
            self._tokens += 1
            parts += self._cut(self._parser.feed([token]))
            if not self._parser.is_marker(token):
                place = TokenPlace(self._tokens - 1, self._parser.channel, before)
                self._held.append((place, self._given))
            if not self._parallel_calls and self.calls and self._parser.channel != "tool":
                self.is_over = True
        return Written(merge(parts), self._ready())

    def finish(self) -> Written:
        """What is held back still; call it once, after the last token."""
        parts: list[Part] = []
        if self.stop is None:
            parts = self._cut(self._parser.finish())
            if self.stop is None and (text := self._stops.finish()):
                self._written += len(text)
                parts.append(Content(text))
        self.is_over = True
        return Written(merge(parts), self._ready())

    def _cut(self, found: list[Part]) -> list[Part]:
        """The parts up to the answer's end."""
        parts: list[Part] = []
        for part in found:
            if self.is_over:
                break
            if isinstance(part, Content):
                self._given += len(part.text)
                text = self._stops.feed(part.text, may_end=self._tokens > self._min_tokens)
                self._written += len(text)
                self.is_over = self.stop is not None
                if text:
                    parts.append(Content(text))
                continue
            if isinstance(part, ToolCall):
                if self.calls and not self._parallel_calls:
                    self.is_over = True
                    break
                self.calls += 1
            if isinstance(part, Arguments) and part.call >= self.calls:
                break
            parts.append(part)
        return parts

    def _ready(self) -> list[TokenPlace]:
        """The tokens whose text is written; after the end, those that are left begin behind it."""
        ready: list[TokenPlace] = []
        while self._held:
            place, end = self._held[0]
            cut = self.is_over and place.offset < self._written
            if place.channel == "content" and end > self._written and not cut:
                break
            ready.append(place)
            self._held.pop(0)
        return ready
