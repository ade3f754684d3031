"""Build tokenizers from bare vocabularies: GPT-2's and tiktoken's.

R. Sennrich, B. Haddow and A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
2016. Each tokenizer is a `tokenizers.Tokenizer`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from models.text.pretokenizers import find_pre_tokenizer

AnyText = TypeVar("AnyText", str, bytes)
_MOST_WORK = 200_000_000  # squares of the lengths of tokens: finding what each merges takes as long


def byte_level(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    cut: str = "gpt-2",
    special: Sequence[tuple[str, int]] = (),
    prefix: bool = False,
) -> Any:
    """A `tokenizers.Tokenizer` for byte-pair encoding of bytes, GPT-2's way.

    Args:
      vocab: the number of each token; bytes are written as letters, as in GPT-2's vocab.json.
      merges: pairs, in the order in which they are merged.
      cut: how text is split into words first, by GGUF's name: "gpt-2", "llama-bpe", "qwen2", ...
      special: control tokens, and their numbers.
      prefix: whether a space is put before every text.

    Raises:
      ValueError: `cut` is unknown.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    words = find_pre_tokenizer(cut)
    model = models.BPE(vocab=vocab, merges=list(merges), ignore_merges=words.whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = words.build(prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, _ in special])
    return tokenizer


def merges_of_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges for `byte_level`, from tiktoken's ranks.

    A token is the merge of any two tokens that it splits into; tiktoken merges the
    lowest rank first.

    Raises:
      ValueError: the tokens are too long to look for what each merges.
    """
    if sum(len(token) ** 2 for token in ranks) > _MOST_WORK:
        longest = max(map(len, ranks))
        raise ValueError(f"{len(ranks):,} tokens of up to {longest:,} bytes split into too many")
    letters = byte_letters()

    def as_letters(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = sorted(_halves(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(as_letters(left), as_letters(right)) for left, right in halves]
    return {as_letters(token): rank for token, rank in ranks.items()}, merges


def _halves(token: AnyText, known: Mapping[AnyText, int]) -> list[tuple[AnyText, AnyText]]:
    splits = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in splits if left in known and right in known]


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: the byte itself if it is printable, else from U+0100 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    letters = {byte: chr(byte) for byte in printed}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
