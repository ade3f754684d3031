"""Guess the next tokens of a text from what it has said already, to verify them all in one step.

Prompt lookup: A. Saxena, "Prompt Lookup Decoding", 2023; Y. Leviathan et al., "Fast Inference from
Transformers via Speculative Decoding", 2023, for the verification. A guess is right if it is the
token that the request would have chosen at its place anyway, with its own random number there. So
the text is the same with guesses and without, at any temperature.
"""

from collections.abc import Sequence
from typing import NamedTuple

_SHORTEST, _LONGEST = 3, 12  # tokens of the n-grams that are looked up
_CANDIDATES = 8  # earlier places that are compared
_PATIENCE = 4  # wrong guesses in a row after which guessing pauses
_PAUSE = 16  # tokens


class Guess(NamedTuple):
    """Tokens that may come next, and who says so."""

    tokens: list[int]
    is_predicted: bool = False  # they are of the request's prediction
    is_drafted: bool = False  # a draft model made them


class PromptLookup:
    """The n-grams of one text: of a predicted text, the prompt, and what was made so far."""

    def __init__(self, prediction: Sequence[int], prompt: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._wrong = self._pause = 0
        self._predicted = len(prediction)
        for token in (*prediction, *prompt):
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens that the text now has."""
        for token in tokens:
            self._append(token)
        self._pause = max(0, self._pause - len(tokens))

    def guess(self, most: int) -> Guess:
        """What followed the newest n-gram where it stood before.

        Args:
          most: the most tokens to guess; there may be none.
        """
        if self._pause or len(self._tokens) < _SHORTEST:
            return Guess([])
        best, begin = 0, -1
        for end in reversed(self._ends[tuple(self._tokens[-_SHORTEST:])][-_CANDIDATES - 1 : -1]):
            length = self._match(end)
            if length > best:
                best, begin = length, end
            if best == _LONGEST:
                break
        if begin < 0:
            return Guess([])
        return Guess(self._tokens[begin : begin + most], is_predicted=begin < self._predicted)

    def judge(self, guessed: int, right: int) -> None:
        """Takes note of how many of the guessed tokens were right."""
        self._wrong = 0 if right else self._wrong + 1
        if guessed and self._wrong >= _PATIENCE:
            self._wrong, self._pause = 0, _PAUSE

    def _append(self, token: int) -> None:
        self._tokens.append(int(token))
        if len(self._tokens) >= _SHORTEST:
            gram = tuple(self._tokens[-_SHORTEST:])
            self._ends.setdefault(gram, []).append(len(self._tokens))

    def _match(self, end: int) -> int:
        """How many tokens before `end` equal the newest ones, up to the longest n-gram."""
        length = _SHORTEST
        while (
            length < _LONGEST
            and length < end
            and self._tokens[end - 1 - length] == self._tokens[-1 - length]
        ):
            length += 1
        return length
