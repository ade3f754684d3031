"""Bound what a tokenizer costs: the length of its tokens, and how much longer it makes texts.

Ten replacements by ten letters make a text 10**10 times as long. A letter's worth is how long it
can come to be in the steps that follow. It is found from the last step to the first: with `a -> bb`
and then `b -> ccc`, "b" is worth 3 and "a" 6.
"""

import base64
import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

import numpy as np

from models.checkpoints.json_file import parse_json, shown
from models.text.charsmap import longest_replacement

LONGEST = 10_000  # characters of a token; of a piece of text, most have 20
_MOST_GROWTH = 1000  # times as long; Unicode's compatibility forms alone make one letter 18
_MOST_ADDED = 10_000  # characters, or tokens, to any text
_MOST_STEPS = 1000
# What Unicode, and `tokenizers`, make of one character at most.
_GROWTH_OF_TYPE = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12},
    **{"Strip": 1, "StripAccents": 1, "Nmt": 1, "ByteLevel": 4},
    **{"ByteFallback": 1, "Fuse": 1, "Metaspace": 1, "WordPiece": 2, "BPEDecoder": 2, "CTC": 2},
}
# With these a pattern may match between two characters, where it takes none away.
_BETWEEN = ("(?=", "(?!", "(?<", "\\b", "\\B", "\\A", "\\G", "\\K", "\\Z", "\\z", "^", "$")


@dataclasses.dataclass(frozen=True)
class _Worth:
    """How many characters each character can come to be, and how many come to any text."""

    of: dict[str, float]
    other: float  # of a character that is not in `of`
    added: float

    def __call__(self, text: str) -> float:
        return sum(self.of.get(c, self.other) * count for c, count in Counter(text).items())

    @property
    def most(self) -> float:
        return max([self.other, *self.of.values()])


def check_tokens(file: pathlib.Path) -> None:
    """Checks that tokens and patterns in a tokenizer.json are short, before `tokenizers` reads it.

    It keeps the pieces of a unigram model in a tree, which it takes down by recursion: a piece of
    a million letters ends the process. Each class of letters in a pattern takes 20 kB.

    Raises:
      ValueError: a token or a pattern has more than 10,000 characters.
    """
    content = np.frombuffer(file.read_bytes(), np.uint8)
    ends = np.flatnonzero((content[1:] == ord('"')) & (content[:-1] != ord("\\")))
    # No text is longer than the way from one quotation mark to the next. Long ones are rare.
    if len(content) <= LONGEST or np.diff(ends, prepend=0, append=len(content)).max() <= LONGEST:
        return
    fields = parse_json(content.tobytes(), str(file))
    model = fields.pop("model", None)
    vocab = model.get("vocab") if isinstance(model, dict) else None
    for entry in vocab if isinstance(vocab, dict | list) else ():
        _check_length(entry[0] if isinstance(entry, list) and entry else entry, "token", file)
    waiting: list[Any] = [fields]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            _check_length(part.get("Regex"), "pattern", file)
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _check_length(text: Any, kind: str, file: pathlib.Path) -> None:
    if isinstance(text, str) and len(text) > LONGEST:
        raise ValueError(
            f"{file}: the {kind} {shown(text)} has {len(text):,} characters, more than {LONGEST:,}"
        )


def check_growth(tokenizer: Any, file: pathlib.Path) -> None:
    """Checks what a `tokenizers.Tokenizer` can make of a text, before it is given any.

    Args:
      tokenizer: read from `file`.
      file: for messages.

    Raises:
      ValueError: a text may become 1,000 times as long, or get 10,000 characters or tokens more; or
        the post-processor adds a token that it does not define.
    """
    for name, parts in (("normalizer", "normalizers"), ("decoder", "decoders")):
        steps = _steps(getattr(tokenizer, name), parts, f"{file}: its {name}")
        worth = _Worth({}, 1.0, 0.0)
        for step in reversed(steps):
            worth = _before(step, worth)
        _check(f"{file}: its {name}", worth.most, worth.added)
    times, added = 1.0, 0.0
    where = f"{file}: its post_processor"
    for step in _steps(tokenizer.post_processor, "processors", where):
        texts, tokens = _frame(step, where)
        times, added = times * texts, added * texts + tokens
    _check(where, times, added)


def _check(where: str, times: float, added: float) -> None:
    if times > _MOST_GROWTH:
        raise ValueError(
            f"{where} may make a text {times:,.0f} times as long, more than {_MOST_GROWTH:,}"
        )
    if added > _MOST_ADDED:
        raise ValueError(f"{where} may add {added:,.0f} to any text, more than {_MOST_ADDED:,}")


def _steps(part: Any, name: str, where: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer, those of sequences one by one."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    steps = []
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":
            waiting += reversed(step[name])
        else:
            steps.append(step)
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"{where} has {len(steps):,} steps, more than {_MOST_STEPS:,}")
    return steps


def _before(step: dict[str, Any], after: _Worth) -> _Worth:
    """The worth before a step of a normalizer or decoder, from that after it."""
    match step:
        case {"type": "Prepend", "prepend": str(text)}:
            return dataclasses.replace(after, added=after.added + after(text))
        case {"type": "Replace", "pattern": {"String": str(taken)}, "content": str(given)} if taken:
            share = after(given) / len(taken)
            of = {c: max(after.of.get(c, after.other), share) for c in taken}
            return dataclasses.replace(after, of=after.of | of)
        case {"type": "Replace", "pattern": pattern, "content": str(given)}:
            worth = after(given)
            if _takes_something(pattern.get("Regex", "")):
                return _Worth(
                    {c: max(one, worth) for c, one in after.of.items()},
                    max(after.other, worth),
                    after.added,
                )
            return _Worth(
                {c: one + worth for c, one in after.of.items()},
                after.other + worth,
                after.added + worth,
            )
        case {"type": "Precompiled", "precompiled_charsmap": str(table)}:
            times = max(1, longest_replacement(base64.b64decode(table)))
        case {"type": kind}:
            times = _GROWTH_OF_TYPE.get(kind, max(_GROWTH_OF_TYPE.values()))
    return after if times == 1 else _Worth({}, times * after.most, after.added)


def _takes_something(pattern: str) -> bool:
    """Whether each match of a regular expression surely takes a character away."""
    from tokenizers import Regex, normalizers

    if any(sign in pattern for sign in _BETWEEN):
        return False
    return normalizers.Replace(Regex(pattern), "x").normalize_str("") == ""


def _frame(step: dict[str, Any], where: str) -> tuple[int, int]:
    """How often a step of a post-processor repeats the text, and how many tokens it adds."""
    match step:
        case {"type": "TemplateProcessing", "single": single, "special_tokens": tokens}:
            names = [piece["SpecialToken"]["id"] for piece in single if "SpecialToken" in piece]
            if unknown := [name for name in names if name not in tokens]:
                raise ValueError(f"{where} names {shown(unknown[0])}, which it does not define")
            return len(single) - len(names), sum(len(tokens[name]["ids"]) for name in names)
        case {"type": "BertProcessing" | "RobertaProcessing"}:
            return 1, 2
    return 1, 0
