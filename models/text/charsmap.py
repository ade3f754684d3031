"""Normalize text by the table of a SentencePiece model, as SentencePiece does.

The table (`precompiled_charsmap`) is a length, a trie of this length, and the texts that replace
others, which end in zeros. The trie is an array of units of 32 bits, as Darts-clone lays it out:
https://github.com/s-yata/darts-clone. `tokenizers` has a normalizer that reads it too, but takes
whole grapheme clusters for the first letter that the table knows: it loses accents.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

_MOST_BYTES = 4_000_000  # of a table; the largest that SentencePiece brings has a quarter of 1 MB
_MOST_GROWTH = 1000  # bytes that replace one text; Unicode's own take 33
_MOST_PREFIXES = 1_000_000  # of the texts to replace; Unicode's own have a quarter of them
_LONGEST = 256  # bytes of a text to replace; of Unicode's own, the longest has 11
_ROWS = 4096  # units of the trie that are looked up at once


@dataclasses.dataclass(frozen=True)
class Charsmap:
    """What replaces texts, the longest that is known first."""

    places: dict[str, int]  # of a text to replace: where in `texts` what replaces it begins
    texts: bytes  # each ends in a zero

    def rewriter(self, kept: Sequence[str] = ()) -> "Rewriter":
        """A normalizer that leaves the texts in `kept` as they are."""
        lengths: dict[str, set[int]] = {}
        known = {text: text for text in kept}
        for text in [*self.places, *kept]:
            lengths.setdefault(text[0], set()).add(len(text))
        ordered = {first: sorted(some, reverse=True) for first, some in lengths.items()}
        begins = "".join(map(re.escape, sorted(ordered)))
        return Rewriter(self, known, ordered, re.compile(f"[{begins}]" if begins else r"(?!)"))

    def replacement(self, text: str) -> str | None:
        """What replaces a text; None if it stays."""
        place = self.places.get(text)
        if place is None:
            return None
        return self.texts[place : self.texts.index(0, place)].decode()


@dataclasses.dataclass(frozen=True)
class Rewriter:
    """A custom normalizer of `tokenizers`."""

    charsmap: Charsmap
    kept: dict[str, str]
    lengths: dict[str, list[int]]  # of the texts that begin with a character, the longest first
    begins: re.Pattern[str]  # these characters

    def normalize(self, normalized: Any) -> None:
        """Rewrites a `tokenizers.NormalizedString` in place."""
        before = normalized.normalized
        after = self.rewrite(before)
        if after != before:
            normalized.clear()
            normalized.append(after)

    def rewrite(self, text: str) -> str:
        """The text with everything replaced that the table knows."""
        parts, done, place = list[str](), 0, 0
        while match := self.begins.search(text, place):
            start = match.start()
            end, given = self._longest(text, start)
            if given is not None:
                parts += text[done:start], given
                done = end
            place = end
        return "".join([*parts, text[done:]])

    def _longest(self, text: str, start: int) -> tuple[int, str | None]:
        """The end of the longest text at `start` that is known, and what replaces it."""
        pieces = [text[start : start + length] for length in self.lengths[text[start]]]
        # As in SentencePiece, what is kept goes before what is replaced, however long.
        for piece in pieces:
            if piece in self.kept:
                return start + len(piece), piece
        for piece in pieces:
            if (given := self.charsmap.replacement(piece)) is not None:
                return start + len(piece), given
        return start + 1, None


def longest_replacement(table: bytes) -> int:
    """Bytes of the longest text that a table puts in another's place."""
    return max(map(len, _split(table)[1].split(b"\0")))


def _split(table: bytes) -> tuple[int, bytes]:
    """The length of a table's trie in bytes, as it says, and the texts after it."""
    size = int.from_bytes(table[:4], "little")
    return size, table[4 + size :]


def read_charsmap(table: bytes) -> Charsmap:
    """The table of a SentencePiece model.

    Raises:
      ValueError: it is damaged, too large, or makes a text too long.
    """
    if len(table) > _MOST_BYTES:
        raise ValueError(f"its precompiled_charsmap has {len(table):,} bytes, over {_MOST_BYTES:,}")
    size, texts = _split(table)
    if not 0 < size <= len(table) - 4 or size % 4 or not texts.endswith(b"\0"):
        raise ValueError("its precompiled_charsmap is damaged: its trie is cut short")
    if (longest := longest_replacement(table)) > _MOST_GROWTH:
        raise ValueError(
            f"its precompiled_charsmap puts {longest:,} bytes in a text's place, over "
            f"{_MOST_GROWTH:,}"
        )
    try:
        texts.decode()
        units = np.frombuffer(table, "<u4", size // 4, 4)
        places = {key.decode(): place for key, place in _keys(units)}
    except UnicodeDecodeError as error:
        raise ValueError(f"its precompiled_charsmap is damaged: {error}") from None
    for place in places.values():
        # A byte of this range goes on with a character.
        if place >= len(texts) or texts[place] & 0xC0 == 0x80:
            raise ValueError(f"its precompiled_charsmap is damaged: no text begins at {place}")
    return Charsmap(places, texts)


def _keys(units: np.ndarray) -> list[tuple[bytes, int]]:
    """The keys of a trie, each with its value.

    Args:
      units: of 32 bits: a byte (0 to 7), whether a key ends here (8), and where the next ones are.
    """
    labels = np.arange(1, 256, dtype=np.uint32)
    shifts = (units & np.uint32(1 << 9)) >> np.uint32(6)
    ways = (units >> np.uint32(10)) << shifts
    keys: list[tuple[bytes, int]] = []
    # Level by level: the units that are reached with a prefix, and the prefixes.
    level, prefixes = np.zeros(1, np.uint32), [b""]
    seen = 0
    while len(level):
        if len(prefixes[0]) > _LONGEST:
            raise ValueError(f"its precompiled_charsmap has a text of over {_LONGEST} bytes")
        nexts, longer = [], list[bytes]()
        for first in range(0, len(level), _ROWS):
            some = level[first : first + _ROWS]
            at = some ^ ways[some]
            if at.max() >= len(units):
                raise ValueError("its precompiled_charsmap is damaged: its trie leads out of it")
            for row in np.flatnonzero(units[some] & np.uint32(1 << 8)):
                keys.append((prefixes[first + row], int(units[at[row]] & np.uint32(0x7FFFFFFF))))
            children = at[:, None] ^ labels
            inside = np.minimum(children, np.uint32(len(units) - 1))
            # The highest bit is set where a value is.
            found = (units[inside] & np.uint32(0x800000FF)) == labels
            rows, columns = np.nonzero(found & (children < len(units)))
            nexts.append(children[rows, columns])
            longer += [
                prefixes[first + row] + bytes([column + 1])
                for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
            ]
            # Branches may share what they end in, and in a damaged trie meet themselves.
            if seen + len(longer) > _MOST_PREFIXES:
                raise ValueError(f"its precompiled_charsmap has over {_MOST_PREFIXES:,} prefixes")
        seen += len(longer)
        level, prefixes = np.concatenate(nexts), longer
    return keys
