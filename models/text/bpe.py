"""Build tokenizers from bare vocabularies: GPT-2's, tiktoken's and SentencePiece's.

R. Sennrich, B. Haddow and A. Birch, "Neural Machine Translation of Rare Words with Subword Units",
2016. Each tokenizer is a `tokenizers.Tokenizer`.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

AnyText = TypeVar("AnyText", str, bytes)

# Regular expressions that split text into words, inside which bytes are merged; GGUF names them.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    + _SPACES
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTIONS}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTIONS}?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,  # built into `tokenizers`' byte level
    "default": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
    "gpt-4o": _O200K,
}
_DIGITS_APART = ("smollm", "refact", "starcoder", "codeshell")  # GPT-2's, but each digit is a word


def byte_level(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    cut: str = "gpt-2",
    special: Sequence[tuple[str, int]] = (),
    before: Sequence[int] = (),
    prefix: bool = False,
) -> Any:
    """A `tokenizers.Tokenizer` for byte-pair encoding of bytes, GPT-2's way.

    Args:
      vocab: the number of each token; bytes are written as letters, as in GPT-2's vocab.json.
      merges: pairs, in the order in which they are merged.
      cut: how text is split into words first, by GGUF's name: "gpt-2", "llama-bpe", "qwen2", ...
      special: control tokens, and their numbers.
      before: tokens that every text begins with.
      prefix: whether a space is put before every text.

    Raises:
      ValueError: `cut` is unknown.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if cut not in _SPLITS and cut not in _DIGITS_APART:
        known = sorted([*_SPLITS, *_DIGITS_APART])
        raise ValueError(f"the pre-tokenizer {cut!r} is not one of {', '.join(known)}")
    ignore_merges = cut in _SPLITS and _SPLITS[cut] is not None and cut != "qwen2"
    model = models.BPE(vocab=vocab, merges=list(merges), ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    pattern = _SPLITS.get(cut)
    splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        splitter = pre_tokenizers.Sequence([split, splitter])
    elif cut in _DIGITS_APART:
        splitter = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), splitter]
        )
    tokenizer.pre_tokenizer = splitter
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
    """A `tokenizers.Tokenizer` for SentencePiece's byte-pair encoding.

    Args:
      names: the pieces, in the order of their numbers.
      scores: the score of each piece; the highest is merged first.
      special: control pieces.
      unknown: the piece for unknown text; single bytes have pieces of their own, from `<0x00>` on.
      prefix: whether a space is put before every text.
      before: tokens that every text begins with.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {name: i for i, name in enumerate(names)}
    score = dict(zip(names, scores, strict=True))
    skipped = {*special, unknown}
    # A piece is the merge of any two pieces that it splits into: "▁the" of "▁t" + "he".
    candidates = [
        (-score[name], vocab[left], vocab[right], left, right)
        for name in names
        if name not in skipped
        for left, right in _halves(name, vocab)
    ]
    merges = [(left, right) for *_, left, right in sorted(candidates)]
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
    """The vocabulary and the merges for `byte_level`, from tiktoken's ranks.

    A token is the merge of any two tokens that it splits into; tiktoken merges the
    lowest rank first.
    """
    letters = _letters()

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


def _letters() -> list[str]:
    """GPT-2's letter for each byte: the byte itself if it is printable, else from U+0100 on."""
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
