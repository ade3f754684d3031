"""This file is tokenizers built from bare vocabularies: GPT-2's, tiktoken's and SentencePiece's.

R. Sennrich, B. Haddow and A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
2016. Each is a `tokenizers.Tokenizer`; how text is cut before it is merged is told by name.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

# How text is cut into words before bytes are merged, by the names that GGUF has for it.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    + _REST
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
)
_CUTS: dict[str, str | None] = {
    "gpt-2": None,  # the byte level's own
    "default": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "gpt-4o": _O200K,
}
_DIGITS_APART = ("smollm", "refact", "starcoder", "codeshell")  # GPT-2's, each digit a word


def byte_level(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    cut: str = "gpt-2",
    special: Sequence[tuple[str, int]] = (),
    before: Sequence[int] = (),
) -> Any:
    """Byte-pair encoding of bytes that are written as letters, as GPT-2 does.

    Args:
      vocab: the number of each token.
      merges: pairs in the order in which they are merged.
      cut: the name of how text is cut first.
      special: tokens that are not text, and their numbers.
      before: special tokens that a text begins with.

    Raises:
      ValueError: `cut` is unknown.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if cut not in _CUTS and cut not in _DIGITS_APART:
        known = sorted([*_CUTS, *_DIGITS_APART])
        raise ValueError(f"the pre-tokenizer {cut!r} is not one of {', '.join(known)}")
    whole = cut in _CUTS and _CUTS[cut] is not None and cut != "qwen2"
    model = models.BPE(vocab=vocab, merges=list(merges), ignore_merges=whole)
    tokenizer = Tokenizer(model)
    pattern = _CUTS.get(cut)
    level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        level = pre_tokenizers.Sequence([split, level])
    elif cut in _DIGITS_APART:
        level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name, _ in special])
    _begin(tokenizer, before)
    return tokenizer


def pieces(
    names: Sequence[str],
    scores: Sequence[float],
    *,
    special: Sequence[str] = (),
    unknown: str | None = "<unk>",
    prefix: bool = True,
    before: Sequence[int] = (),
) -> Any:
    """SentencePiece's byte-pair encoding, from its pieces and their scores.

    Args:
      names: the pieces, in the order of their numbers.
      scores: of each: what is merged first is what scores highest.
      special: pieces that are not text.
      unknown: the piece of what is not known; bytes have pieces of their own, `<0x00>` on.
      prefix: whether a text is read as if a space stood before it.
      before: tokens that a text begins with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {name: i for i, name in enumerate(names)}
    score = dict(zip(names, scores, strict=True))
    skipped = {*special, unknown}
    found = [
        (-score[name], vocab[left], vocab[right], left, right)
        for name in names
        if name not in skipped
        for left, right in _halves(name, vocab)
    ]
    merges = [(left, right) for *_, left, right in sorted(found)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + [space])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(content=" ", left=1)] * prefix
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    _begin(tokenizer, before)
    return tokenizer


def merges_of_ranks(ranks: dict[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of tiktoken's ranks, bytes written as letters."""
    letters = _letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = sorted(_halves(token, ranks), key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written(left), written(right)) for left, right in halves]
    return {written(token): rank for token, rank in ranks.items()}, merges


def _halves(token: Any, known: Any) -> list[tuple[Any, Any]]:
    cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _letters() -> list[str]:
    """The letter that GPT-2 writes each byte as: itself where it can be printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printed)
    letters = {byte: chr(byte) for byte in printed}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _begin(tokenizer: Any, before: Sequence[int]) -> None:
    if not before:
        return
    from tokenizers import processors

    names = [tokenizer.id_to_token(token) for token in before]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(itertools.chain(names, ["$A"])),
        special_tokens=list(zip(names, before, strict=True)),
    )
