"""Read a SentencePiece model, and build the tokenizer that encodes as it does.

T. Kudo and J. Richardson, "SentencePiece: A simple and language independent subword tokenizer and
detokenizer for Neural Text Processing", 2018. The file is a protocol buffer; its fields are those
of `sentencepiece_model.proto`.
"""

import collections
import dataclasses
import enum
import math
import pathlib
import re
import struct
from collections.abc import Iterator
from typing import Any

from models.checkpoints.json_file import shown
from models.text.charsmap import read_charsmap
from models.text.limits import LONGEST

_SPACE = "▁"  # how SentencePiece writes a space
# Squares of the lengths of all pieces: finding the two pieces that each merges takes as long. The
# largest vocabularies have 30 million.
_MOST_WORK = 200_000_000


class Kind(enum.IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """The fields of a SentencePiece model that change tokens."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[Kind, ...]
    unigram: bool  # else byte-pair encoding
    byte_fallback: bool
    unknown: int
    begin: int  # negative: there is none
    end: int
    charsmap: bytes  # how characters are normalized; empty: not at all
    dummy_prefix: bool  # a space is put before every text
    remove_spaces: bool  # those that begin and end a text, and all but one in a row
    escape_spaces: bool

    def of_kind(self, kind: Kind) -> list[str]:
        """The pieces of one kind, in the order of their numbers."""
        return [piece for piece, one in zip(self.pieces, self.kinds, strict=True) if one == kind]


def read_model(file: pathlib.Path) -> SentencePieceModel:
    """The SentencePiece model in a file.

    Raises:
      ValueError: it is no such model, or of a kind that is not supported.
    """
    try:
        parts = [(number, value) for number, value in _fields(file.read_bytes())]
        pieces = [dict(_fields(value)) for number, value in parts if number == 1]
        trainer = dict(_fields(_last(parts, 2)))
        normalizer = dict(_fields(_last(parts, 3)))
        model = SentencePieceModel(
            pieces=tuple(piece[1].decode() for piece in pieces),
            scores=tuple(struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces),
            kinds=tuple(Kind(piece.get(3, Kind.NORMAL)) for piece in pieces),
            unigram=trainer.get(3, 1) == 1,
            byte_fallback=bool(trainer.get(35, 0)),
            unknown=_signed(trainer.get(40, 0)),
            begin=_signed(trainer.get(41, 1)),
            end=_signed(trainer.get(42, 2)),
            charsmap=normalizer.get(2, b""),
            dummy_prefix=bool(normalizer.get(3, 1)),
            remove_spaces=bool(normalizer.get(4, 1)),
            escape_spaces=bool(normalizer.get(5, 1)),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{file} is not a SentencePiece model: {error!r}") from None
    if not model.pieces:
        raise ValueError(f"{file} is not a SentencePiece model: it has no pieces")
    if not all(map(math.isfinite, model.scores)):
        raise ValueError(f"{file}: a piece has a score that is not finite")
    [(piece, count)] = collections.Counter(model.pieces).most_common(1)
    if count > 1 or "" in model.pieces:
        raise ValueError(f"{file}: piece {piece if count > 1 else ''!r} is empty or there twice")
    if (longest := max(model.pieces, key=len)) and len(longest) > LONGEST:
        raise ValueError(f"{file}: piece {shown(longest)} has {len(longest):,} characters")
    if trainer.get(3, 1) not in (1, 2):
        raise ValueError(f"{file}: model_type {trainer[3]} is neither unigram (1) nor bpe (2)")
    if trainer.get(24, 0):
        raise ValueError(f"{file}: treat_whitespace_as_suffix is not supported")
    for name, number in (("unk_id", model.unknown), ("bos_id", model.begin), ("eos_id", model.end)):
        if number >= len(model.pieces) or number < 0 and name == "unk_id":
            raise ValueError(
                f"{file}: {name} is {number}, and there are {len(model.pieces)} pieces"
            )
    return model


def build(model: SentencePieceModel, *, legacy: bool = True) -> Any:
    """A `tokenizers.Tokenizer` that encodes as the SentencePiece model does.

    Control pieces are special tokens of it. If the model has a charsmap, `exact_normalizer` must
    take the place of the normalizer.

    Args:
      model: the model.
      legacy: whether the space before a text is also put before what follows a special token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(_unigram(model) if model.unigram else _byte_pairs(model))
    charsmap = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer.normalizer = _normalizer(charsmap, model, legacy)
    splits: list[Any] = []
    if model.dummy_prefix:
        scheme = "always" if legacy else "first"
        splits.append(pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False))
    if whole := model.of_kind(Kind.USER_DEFINED):
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(piece) for piece in longest_first))
        splits.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    joins: list[Any] = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        joins.append(decoders.ByteFallback())
    joins.append(decoders.Fuse())
    if model.dummy_prefix:
        joins.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(joins)
    control = model.of_kind(Kind.CONTROL)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    return tokenizer


def exact_normalizer(model: SentencePieceModel, *, legacy: bool = True) -> Any | None:
    """The normalizer that SentencePiece has, where that of `build` differs; else None.

    No tokenizer.json can hold it.

    Raises:
      ValueError: the charsmap is damaged or too large.
    """
    from tokenizers import normalizers

    if not model.charsmap:
        return None
    rewriter = read_charsmap(model.charsmap).rewriter(model.of_kind(Kind.USER_DEFINED))
    return _normalizer([normalizers.Normalizer.custom(rewriter)], model, legacy)


def _normalizer(charsmap: list[Any], model: SentencePieceModel, legacy: bool) -> Any:
    """The steps of `charsmap`, and after them those for spaces."""
    from tokenizers import Regex, normalizers

    steps = list(charsmap)
    if model.remove_spaces:
        # Spaces alone: SentencePiece keeps newlines.
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.escape_spaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if model.dummy_prefix and legacy:
        # Metaspace leaves out the prefix of a text that begins with a space.
        steps.append(normalizers.Replace(Regex(rf"\A{_SPACE}"), 2 * _SPACE))
    return normalizers.Sequence(steps)


def _unigram(model: SentencePieceModel) -> Any:
    from tokenizers.models import Unigram

    scored = list(zip(model.pieces, model.scores, strict=True))
    return Unigram(scored, unk_id=model.unknown, byte_fallback=model.byte_fallback)


def _byte_pairs(model: SentencePieceModel) -> Any:
    from tokenizers.models import BPE

    work = sum(len(piece) ** 2 for piece in model.pieces)
    if work > _MOST_WORK:
        longest = max(map(len, model.pieces))
        raise ValueError(
            f"{len(model.pieces):,} pieces of up to {longest:,} characters split into too many"
        )
    vocab = {piece: number for number, piece in enumerate(model.pieces)}
    # A piece is the merge of any two pieces that it splits into; the highest score merges first.
    normal = {
        piece: (-score, number)
        for number, (piece, score) in enumerate(zip(model.pieces, model.scores, strict=True))
        if model.kinds[number] == Kind.NORMAL
    }
    merges = sorted(
        (rank, piece[:i], piece[i:])
        for piece, rank in normal.items()
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    )
    return BPE(
        vocab=vocab,
        merges=[(left, right) for _, left, right in merges],
        unk_token=model.pieces[model.unknown],
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        # User-defined pieces are words of their own, which no merge makes.
        ignore_merges=Kind.USER_DEFINED in model.kinds,
    )


def _last(parts: list[tuple[int, Any]], number: int) -> bytes:
    return next((value for one, value in reversed(parts) if one == number), b"")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer by number: integers, or the bytes of anything else."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        match key & 7:
            case 0:
                value: int | bytes
                value, place = _varint(message, place)
            case 1:
                value, place = message[place : place + 8], place + 8
            case 2:
                size, place = _varint(message, place)
                value, place = message[place : place + size], place + size
            case 5:
                value, place = message[place : place + 4], place + 4
            case wire:
                raise ValueError(f"wire type {wire} at byte {place}")
        if place > len(message):
            raise ValueError("it is cut short")
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError(f"a number at byte {place} is too long")
