"""The text of one answer, token by token; no character is ever split."""

import codecs
from collections.abc import Iterable, Iterator

from serving.text.vocabulary import Vocabulary


class Detokenizer:
    """Tokens in, text out: all pieces together are the text of all tokens.

    A token takes bounded work, however long the text is. Special tokens add nothing.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._exact = vocabulary.is_exact
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens: list[int] = []
        self._pieces = vocabulary.tokenizer.stream(self._waiting())

    def feed(self, tokens: Iterable[int]) -> str:
        """What the tokens add; a character comes out with the token that completes it."""
        if self._exact:
            known, special = self._vocabulary.bytes_of, self._vocabulary.special
            return self._decoder.decode(b"".join(known(t) for t in tokens if t not in special))
        text = []
        for token in tokens:
            self._tokens.append(token)
            text.append(next(self._pieces))
        return "".join(text)

    def finish(self) -> str:
        """What is held back still: U+FFFD for a character that was never completed."""
        if self._exact:
            return self._decoder.decode(b"", final=True)
        return "".join(self._pieces)

    def _waiting(self) -> Iterator[int]:
        """The tokens fed so far; it ends when there is none left, which only `finish` meets."""
        while self._tokens:
            yield self._tokens.pop()
