"""Prompts of a wished length for a server whose tokenizer is not known."""

import random
from collections.abc import Sequence

_WORDS = """
about above after again air all along also always and another answer any around ask away back bird
book both boy bread build call came city clear close cold come could count country cover cross dark
day deep door down draw dry each early earth east eat end even every eye face fall family far farm
fast field find fire first fish fly follow food form found four free friend from full game garden
gave give glass gold good great green ground grow half hand hard head hear heat help here high hill
hold home horse hour house ice idea island keep kind king know lake land large last late laugh lead
learn leave left letter life light line list little long look low made make many map mark mean meet
""".split()
FEW_WORDS, MANY_WORDS = 8, 48  # of the two prompts by which tokens are found for words
_USUAL = (0.0, 1.4)  # tokens of markup and of a word, where a server does not count


class PromptMaker:
    """Random words that make prompts of about the wished tokens.

    Prompts differ from their first word on, so that a server's prefix cache finds none of them.

    Args:
      low: tokens of the shortest prompt.
      high: of the longest.
      lines: prompts that are taken in turn instead; empty: words.
    """

    def __init__(self, low: int, high: int, lines: Sequence[str] = ()) -> None:
        self._low, self._high, self._lines = low, high, lines
        self._markup, self._per_word = _USUAL

    def fit(self, few: int, many: int) -> None:
        """Learns the tokens of markup and of a word.

        Args:
          few: tokens of the prompt of `FEW_WORDS` words, as the server counts them.
          many: of that of `MANY_WORDS` words.
        """
        self._per_word = max(0.1, (many - few) / (MANY_WORDS - FEW_WORDS))
        self._markup = max(0.0, few - FEW_WORDS * self._per_word)

    def make(self, index: int, rng: random.Random) -> str:
        """The prompt of a request.

        Args:
          index: of the request in its level.
          rng: chooses length and words.
        """
        if self._lines:
            return self._lines[index % len(self._lines)]
        tokens = rng.randint(self._low, self._high)
        return words(max(1, round((tokens - self._markup) / self._per_word)), rng)


def words(count: int, rng: random.Random) -> str:
    """So many random words."""
    return " ".join(rng.choices(_WORDS, k=count))
