"""Stop strings: the text of an answer ends before the first of them."""

from collections.abc import Sequence


class StopStrings:
    """Text in, text out, up to the stop string that is complete first.

    Text that may be the beginning of a stop string is held back, so that a stop string is found
    across pieces too, and never written in part. However a text is cut into pieces, the output is
    the same. Of two stop strings that end at the same character, the longer one counts.

    Args:
      stops: texts, none empty.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("stop has an empty text; every text would end before it")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def feed(self, text: str, *, may_end: bool = True) -> str:
        """What can be written now; nothing after a match.

        Args:
          text: the next piece.
          may_end: whether a stop string that ends in this piece ends the text.
        """
        if self.matched is not None:
            return ""
        held = len(self._held)
        text = self._held + text
        # The end first, then the beginning: as if the text came character by character.
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if may_end and (start := text.find(stop, max(0, held + 1 - len(stop)))) >= 0
        ]
        if matches:
            _, start, self.matched = min(matches)
            self._held = ""
            return text[:start]
        kept = held_length(text, self._stops)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        text, self._held = self._held, ""
        return text


def held_length(text: str, spellings: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins, but is not, one of the spellings."""
    longest = max((len(spelling) for spelling in spellings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[-length:]
        if any(len(one) > length and one.startswith(end) for one in spellings):
            return length
    return 0
