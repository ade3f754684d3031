"""Build the tokenizer that a GGUF file describes in its metadata.

Where the metadata leave a choice open, llama.cpp's is taken (`src/llama-vocab.cpp`): which texts
begin with a token, and which tokens end one.
"""

import pathlib
from typing import Any

import numpy as np

from models.checkpoints.gguf import read_header
from models.checkpoints.gguf_header import Header
from models.checkpoints.json_file import shown
from models.text import bpe
from models.text.pretokenizers import PRE_TOKENIZERS
from models.text.sentencepiece_model import Kind, SentencePieceModel, build
from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer

_ROOT = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"  # the usual one; others follow a dot and their name
# Metadata that are read, or change nothing here.
_KNOWN = (
    *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
    *("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id", "unknown_token_id"),
    *("seperator_token_id", "padding_token_id", "cls_token_id", "mask_token_id"),
    *("add_bos_token", "add_eos_token", "add_space_prefix"),
    *("fim_pre_token_id", "fim_suf_token_id", "fim_mid_token_id", "fim_pad_token_id"),
    *("fim_rep_token_id", "fim_sep_token_id"),
    *("prefix_token_id", "suffix_token_id", "middle_token_id"),
)
# Metadata that would change tokens, and that must be false or empty.
_UNSUPPORTED = (
    *("add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap", "suppress_tokens"),
    *("normalizer.lowercase", "normalizer.strip_accents"),
)
_MOST_TOKENS = 500_000  # the largest vocabularies have half of them
_MOST_ADDED = 100_000  # tokens that are found whole; models of speech have 66,000
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Tokens that end a text wherever a vocabulary has them.
_ENDS_BY_NAME = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~["),
    "<｜end▁of▁sentence｜>",
)
# They end a text too, if they are no pieces of ordinary text.
_ENDS_IF_SPECIAL = ("</s>", "<eos>", "[EOS]")
# Tokens for filling in the middle of a text that end one, unless the metadata number others.
_FILL_ENDS = {
    "fim_pad_token_id": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep_token_id": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep_token_id": ("<|file_sep|>",),
}
_NAMES = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
# SentencePiece's usual numbers of special tokens, for files that name none
_USUAL = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of_file(file: pathlib.Path) -> Tokenizer:
    """The tokenizer of a GGUF file; one token a byte if the file describes none.

    Raises:
      ValueError: the kind of tokenizer is unknown, a list is damaged, or a value asks for what is
        not supported.
    """
    header = read_header(file)
    kind = header.text(f"{_ROOT}model")
    _check_keys(header)
    if kind in (None, "none", "no_vocab"):
        if f"{_ROOT}tokens" in header:
            raise header.error(f"{_ROOT}model", "but there are tokens")
        return bytes_tokenizer()
    if kind not in ("gpt2", "llama"):
        raise header.error(f"{_ROOT}model", "is no kind of tokenizer that is known: gpt2, llama")
    tokens = header.texts(f"{_ROOT}tokens")
    _check_count(header, "tokens", len(tokens), _MOST_TOKENS)
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    if len(set(tokens)) < len(tokens):
        numbers: dict[str, int] = {}
        i, first = next((i, n) for i, t in enumerate(tokens) if (n := numbers.setdefault(t, i)) < i)
        raise ValueError(f"{file}: {_ROOT}tokens has {shown(tokens[i])} twice, as {first} and {i}")
    kinds = _kinds(header, len(tokens))
    special = _special(header, len(tokens), _USUAL if kind == "llama" else {})
    added = np.isin(kinds, [Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED])
    _check_count(header, "token_type: tokens found whole", int(added.sum()), _MOST_ADDED)
    ends = _ends(special, tokens, kinds)
    if kind == "gpt2":
        inner, begins = _byte_level(header, tokens)
    else:
        inner, begins = _pieces(header, tokens, kinds, special["unknown_token_id"]), True
    _add(inner, tokens, kinds, ends)
    if kind == "gpt2":
        _spell(inner)
    _frame(inner, header, tokens, special, begins)
    names = {
        name: tokens[special[f"{key}_token_id"]]
        for key, name in _NAMES.items()
        if f"{key}_token_id" in special
    }
    return Tokenizer(
        codec=FastCodec(inner),
        ends=ends,
        template=header.text(_TEMPLATE),
        templates={
            key.removeprefix(f"{_TEMPLATE}."): header.text(key) or ""
            for key in header
            if key.startswith(f"{_TEMPLATE}.")
        },
        names=names,
        source=str(file),
    )


def _check_count(header: Header, name: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"{header.file}: {_ROOT}{name} are {count:,}, more than {most:,}")


def _check_keys(header: Header) -> None:
    """Raises ValueError for a key that may change tokens and that nothing here reads."""
    for key in header:
        name = key.removeprefix(_ROOT)
        if name == key or name in _KNOWN:
            continue
        value = header.value(key)
        if name not in _UNSUPPORTED:
            raise header.error(key, "is not known here, and may change the tokens of a text")
        if value is True or (not isinstance(value, bool) and len(value)):
            raise header.error(key, "is not supported")


def _kinds(header: Header, count: int) -> np.ndarray:
    """The kind of each token."""
    name = f"{_ROOT}token_type"
    if name not in header:
        return np.full(count, Kind.NORMAL)
    kinds = header.numbers(name, count)
    # llama.cpp reads 32 bits each, whatever they are; 0 is of no kind.
    outside = np.flatnonzero(~np.isin(kinds, [0, *Kind]))
    if kinds.dtype.itemsize != 4 or kinds.dtype.kind not in "iu" or len(outside):
        at = int(outside[0]) if len(outside) else 0
        raise ValueError(
            f"{header.file}: {name}[{at}]={kinds[at]} is no kind of a token, a whole number of "
            f"32 bits from 0 to {max(Kind)}"
        )
    return kinds


def _special(header: Header, count: int, usual: dict[str, int]) -> dict[str, int]:
    """The numbers of special tokens, by their names in the metadata.

    Raises:
      ValueError: one is beyond the tokens. The one to pad with may be: nothing is padded with it.
    """
    numbers = {name: number for name, number in usual.items() if number < count}
    for name in _KNOWN:
        key = f"{_ROOT}{name}"
        if name.endswith("_token_id") and key in header:
            if name == "padding_token_id" and header.value(key) not in range(count):
                continue
            numbers[name] = header.integer(key, most=count - 1)
    return numbers


def _ends(special: dict[str, int], tokens: list[str], kinds: np.ndarray) -> tuple[int, ...]:
    """The tokens that end a text: those that the metadata number, then those known by name."""
    numbered = [special.get(name) for name in _ENDS]
    by_name = {token: i for i, token in enumerate(tokens)}
    named = [by_name.get(name) for name in _ENDS_BY_NAME]
    for name in _ENDS_IF_SPECIAL:
        number = by_name.get(name)
        if number is not None and kinds[number] in (Kind.CONTROL, Kind.USER_DEFINED):
            named.append(number)
    for key, texts in _FILL_ENDS.items():
        found = (by_name[text] for text in texts if text in by_name)
        named.append(special[key] if key in special else next(found, None))
    ends = dict.fromkeys(i for i in (*numbered, *named) if i is not None)
    texts_of_ends = {tokens[i] for i in ends}
    # Where these end a whole answer, "<|end|>" ends only a part of it.
    if texts_of_ends >= {"<|return|>", "<|call|>"} or (
        "<|flush|>" in texts_of_ends and texts_of_ends & {"<|call|>", "<|calls|>"}
    ):
        ends.pop(by_name.get("<|end|>", -1), None)
    return tuple(ends)


def _byte_level(header: Header, tokens: list[str]) -> tuple[Any, bool]:
    """A `tokenizers.Tokenizer`, and whether texts begin with a token if the metadata do not say."""
    name = f"{_ROOT}pre"
    pre = header.text(name, "default")
    if pre not in PRE_TOKENIZERS:
        raise header.error(name, f"is not one of {', '.join(sorted(PRE_TOKENIZERS))}")
    merges = header.texts(f"{_ROOT}merges")
    halves = [merge.partition(" ") for merge in merges]
    pairs = [(left, right) for left, _, right in halves if left and right]
    if len(pairs) < len(merges):
        i = next(i for i, (left, _, right) in enumerate(halves) if not (left and right))
        raise ValueError(f"{header.file}: {_ROOT}merges[{i}]={shown(merges[i])} is no pair")
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        inner = bpe.byte_level(vocab, pairs, cut=pre)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{header.file}: {_ROOT}merges do not fit its tokens: {error}") from error
    return inner, PRE_TOKENIZERS[pre].begins


def _spell(inner: Any) -> None:
    """Makes the decoder of bytes write added tokens as they are spelled.

    It takes the letters of a token for bytes: "é" for the byte E9, which is no character.
    """
    from tokenizers import decoders

    letters = bpe.byte_letters()
    names = [token.content for token in inner.get_added_tokens_decoder().values()]
    replaced = [
        decoders.Replace(name, "".join(letters[byte] for byte in name.encode()))
        for name in names
        if not name.isascii() and set(name) <= set(letters)
    ]
    if replaced:
        inner.decoder = decoders.Sequence([*replaced, decoders.ByteLevel()])


def _pieces(header: Header, tokens: list[str], kinds: np.ndarray, unknown: int) -> Any:
    prefix = header.flag(f"{_ROOT}add_space_prefix", True)
    # Of these kinds are the pieces that texts are split into; user-defined ones are found in the
    # text as it is written, before spaces are replaced.
    made = (Kind.NORMAL, Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE)
    model = SentencePieceModel(
        pieces=tuple(tokens),
        scores=tuple(header.numbers(f"{_ROOT}scores", len(tokens)).tolist()),
        kinds=tuple(Kind(k) if k in made else Kind.UNUSED for k in kinds.tolist()),
        unigram=False,
        byte_fallback=True,
        unknown=unknown,
        begin=-1,
        end=-1,
        charsmap=b"",
        dummy_prefix=prefix,
        remove_spaces=False,
        escape_spaces=True,
    )
    try:
        return build(model)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{header.file}: its tokenizer cannot be built: {error}") from error


def _add(inner: Any, tokens: list[str], kinds: np.ndarray, ends: tuple[int, ...]) -> None:
    """Makes `inner` find special and user-defined tokens whole, wherever they are in a text."""
    from tokenizers import AddedToken

    whole = [tokens[i] for i in np.flatnonzero(kinds == Kind.USER_DEFINED)]
    numbers = {*np.flatnonzero((kinds == Kind.CONTROL) | (kinds == Kind.UNKNOWN)).tolist(), *ends}
    special = [tokens[i] for i in sorted(numbers) if kinds[i] != Kind.USER_DEFINED]
    inner.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    inner.add_tokens([AddedToken(name, normalized=False) for name in whole])


def _frame(
    inner: Any, header: Header, tokens: list[str], special: dict[str, int], begins: bool
) -> None:
    """Makes `inner` put the tokens around a text that the metadata ask for.

    Args:
      inner: a `tokenizers.Tokenizer`, changed in place.
      header: of the file.
      tokens: all tokens.
      special: the numbers of special tokens.
      begins: whether a text begins with a token, if the metadata do not say.
    """
    from tokenizers import processors

    # Under names of our own: in a token's, what follows a colon would be read as a number.
    parts, used = ["$A"], list[dict[str, Any]]()
    for end, asked in (("bos", begins), ("eos", False)):
        name = f"{end}_token_id"
        if not header.flag(f"{_ROOT}add_{end}_token", asked and name in special):
            continue
        if name not in special:
            raise header.error(f"{_ROOT}{name}", "")
        number = special[name]
        used.append({"id": end, "ids": [number], "tokens": [tokens[number]]})
        parts = [end, *parts] if end == "bos" else [*parts, end]
    if used:
        inner.post_processor = processors.TemplateProcessing(single=parts, special_tokens=used)
