"""From the tokens of an answer to its parts, whatever the family."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from serving.text.detokenizer import Detokenizer
from serving.text.parsers.parts import Channel, Part, Reader, merge
from serving.text.stops import held_length
from serving.text.vocabulary import Vocabulary


class Marker(NamedTuple):
    """A piece of markup in an answer."""

    text: str


class Markup:
    """Splits tokens into text and markers.

    A marker that the vocabulary has as a token of its own is that token alone: text that merely
    spells it stays text. Other markers are found in the text, across tokens.

    Args:
      vocabulary: of the tokens.
      markers: how each marker is written.
    """

    def __init__(self, vocabulary: Vocabulary, markers: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(vocabulary)
        self._vocabulary = vocabulary
        self._tokens = {
            token: Marker(name)
            for name in markers
            if (token := vocabulary.markup.get(name)) is not None
        }
        self._spelled = [name for name in markers if name not in vocabulary.markup]
        self._held = ""

    def is_marker(self, token: int) -> bool:
        """Whether a token is a marker, or another special token, and so adds no text."""
        return token in self._tokens or token in self._vocabulary.special

    def feed(self, token: int) -> list[str | Marker]:
        """What a token adds; text that may begin a marker is held back."""
        marker = self._tokens.get(token)
        if marker is None:
            return self._split(self._detokenizer.feed([token]))
        found = self.finish()
        self._detokenizer = Detokenizer(self._vocabulary)
        return [*found, marker]

    def finish(self) -> list[str | Marker]:
        """The text held back still."""
        found = self._split(self._detokenizer.finish())
        found.append(self._held)
        self._held = ""
        return found

    def _split(self, text: str) -> list[str | Marker]:
        if not self._spelled:
            return [text]
        text = self._held + text
        found: list[str | Marker] = []
        while matches := [(at, name) for name in self._spelled if (at := text.find(name)) >= 0]:
            start, name = min(matches)
            found += [text[:start], Marker(name)]
            text = text[start + len(name) :]
        kept = held_length(text, self._spelled)
        self._held = text[len(text) - kept :]
        found.append(text[: len(text) - kept])
        return found


class Parser:
    """Tokens in, parts out; the parts are the same however the tokens are cut into pieces.

    Args:
      markup: finds the markers.
      reader: knows what they mean.
    """

    def __init__(self, markup: Markup, reader: Reader) -> None:
        self._markup = markup
        self._reader = reader
        self.reasoning_tokens = 0  # so far, markers aside

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""
        return self._reader.channel

    def is_marker(self, token: int) -> bool:
        """Whether a token is markup alone, and so adds no text."""
        return self._markup.is_marker(token)

    def feed(self, tokens: Iterable[int]) -> list[Part]:
        """The parts, or pieces of parts, that the tokens add."""
        parts: list[Part] = []
        for token in tokens:
            parts += self._read(self._markup.feed(token))
            if self.channel == "reasoning" and not self.is_marker(token):
                self.reasoning_tokens += 1
        return merge(parts)

    def finish(self) -> list[Part]:
        """What is held back still; markup that was never completed comes out as content."""
        return merge(self._read(self._markup.finish()) + self._reader.finish())

    def _read(self, found: list[str | Marker]) -> list[Part]:
        parts: list[Part] = []
        for one in found:
            if isinstance(one, Marker):
                parts += self._reader.marker(one.text)
            elif one:
                parts += self._reader.text(one)
        return parts
