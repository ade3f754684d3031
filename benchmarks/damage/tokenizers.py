"""Damaged tokenizers: flipped bits, cut files, JSON values that make no sense; and bombs.

Whatever the damage, the tokenizer either loads and works, or the error names the file; nothing
takes long, and no error comes raw out of a library. Bombs would take all memory, or end the
process, and are refused by name.
"""

import contextlib
import functools
import json
import pathlib
import random
import time
from typing import Any

from benchmarks.damage.case import Case
from models.text.reading import load_tokenizer

_COUNT = 40  # cases of each folder
_MOST_SECONDS = 5.0
_NONSENSE: tuple[Any, ...] = (
    *(None, True, -1, 0, float("inf"), float("nan"), 2**32, 2**70, "", "x", "\ud800", [], {}),
    *([[]], {"a": 1}, "a" * 10_000, {"type": "BPE"}, -0.5),
)
_LETTERS = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
_TEXT = "the wafer <s> café </s><think>"


_A_TO_MANY = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
_TWICE = {
    **{"type": "TemplateProcessing", "pair": [], "special_tokens": {}},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2,
}
_LONG_PIECE = [["<unk>", 0.0], ["x" * 10**6, -1.0]]
# What each puts in the place of a part of tokenizer.json.
_BOMBS: dict[str, dict[str, Any]] = {
    "replacements": {"normalizer": {"type": "Sequence", "normalizers": [_A_TO_MANY] * 9}},
    "a text before each text": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "compatible forms": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 9}},
    "many steps": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10**4}},
    "replacements back": {"decoder": {"type": "Sequence", "decoders": [_A_TO_MANY] * 9}},
    "texts twice": {"post_processor": {"type": "Sequence", "processors": [_TWICE] * 40}},
    "a frame without its tokens": {
        "post_processor": _TWICE | {"single": [{"SpecialToken": {"id": "q", "type_id": 0}}]}
    },
    "a long piece": {"model": {"type": "Unigram", "unk_id": 0, "vocab": _LONG_PIECE}},
    "a far number": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**31}, "merges": []}},
    "many classes of letters": {
        "pre_tokenizer": {
            **{"type": "Split", "pattern": {"Regex": r"\p{L}" * 50_000}},
            **{"behavior": "Isolated", "invert": False},
        }
    },
}


def cases(seed: int) -> list[Case]:
    """The bombs, and `_COUNT` damaged copies of each of three folders, made from `seed`."""
    return [
        Case("tokenizer bombs", name, functools.partial(_bomb_is_refused, name)) for name in _BOMBS
    ] + [
        Case(
            "damaged tokenizers",
            f"{name} {seed}.{i}",
            functools.partial(_loads_or_is_refused, write, f"{seed}.{i}"),
        )
        for name, write in (
            ("tokenizer.json", _tokenizer_json),
            ("vocab.json", _vocab_and_merges),
            ("tokenizer.model", _tokenizer_model),
        )
        for i in range(_COUNT)
    ]


def _bomb_is_refused(name: str, folder: pathlib.Path) -> None:
    _tokenizer_json(folder)
    (folder / "added_tokens.json").unlink()  # which numbers tokens of the file as it was
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | _BOMBS[name]))
    start = time.monotonic()
    try:
        load_tokenizer(folder)
    except ValueError as error:
        assert str(file) in str(error), f"{error} names no file"
    else:
        raise AssertionError("it is read")
    taken = time.monotonic() - start
    assert taken < _MOST_SECONDS, f"it took {taken:.0f} s"


def _loads_or_is_refused(write: Any, seed: str, folder: pathlib.Path) -> None:
    rng = random.Random(seed)
    write(folder)
    file = rng.choice(sorted(folder.iterdir()))
    if file.suffix == ".json" and rng.random() < 0.7:
        fields = _with_nonsense(json.loads(file.read_text()), rng)
        file.write_text(json.dumps(fields))
    else:
        file.write_bytes(_damaged(file.read_bytes(), rng))
    start = time.monotonic()
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        assert str(folder) in str(error), f"{file.name}: {error} names no file"
    else:
        tokens = tokenizer.encode(_TEXT)
        assert all(0 <= token < tokenizer.vocab for token in tokens), f"{file.name}: {tokens}"
        streamed, whole = "".join(tokenizer.stream(tokens)), tokenizer.decode(tokens)
        assert streamed == whole, f"{file.name}: {streamed!r}, {whole!r}"
    taken = time.monotonic() - start
    assert taken < _MOST_SECONDS, f"{file.name}: took {taken:.0f} s"


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, or with some bits flipped."""
    if rng.random() < 0.3:
        return content[: rng.randrange(len(content))]
    damaged = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _with_nonsense(fields: Any, rng: random.Random) -> Any:
    """`fields` with a value or two that make no sense, or gone."""
    places: list[tuple[Any, Any]] = []
    unseen = [fields]
    while unseen:
        whole = unseen.pop()
        parts = whole.items() if isinstance(whole, dict) else enumerate(whole)
        for place, part in list(parts)[:40]:
            places.append((whole, place))
            if isinstance(part, dict | list):
                unseen.append(part)
    for _ in range(rng.randint(1, 2)):
        whole, place = rng.choice(places)
        with contextlib.suppress(IndexError, KeyError):  # the first change may have taken it away
            if rng.random() < 0.2:
                del whole[place]
            else:
                whole[place] = rng.choice(_NONSENSE)
    return fields


def _write_settings(folder: pathlib.Path, first: int) -> None:
    settings = {
        "eos_token": "</s>",
        "additional_special_tokens": ["<x>"],
        "chat_template": "{{ messages }}",
        "clean_up_tokenization_spaces": False,
    }
    added = {"<think>": first, "<x>": first + 1}
    fields = {
        "tokenizer_config": settings,
        "special_tokens_map": {"bos_token": {"content": "<s>", "lstrip": False}},
        "added_tokens": added,
        "generation_config": {"eos_token_id": [2, 5]},
    }
    for name, values in fields.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


def _vocab() -> dict[str, int]:
    names = ["<s>", "</s>", *_LETTERS, "\u0120", "th", "the", "\u0120w"]
    return {name: i for i, name in enumerate(names)}


def _vocab_and_merges(folder: pathlib.Path) -> None:
    vocab = _vocab()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\n\u0120 w\n", encoding="utf-8")
    _write_settings(folder, len(vocab))


def _tokenizer_json(folder: pathlib.Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = _vocab()
    merges = [("t", "h"), ("th", "e"), ("\u0120", "w")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    inner.enable_truncation(3)
    inner.save(str(folder / "tokenizer.json"))
    _write_settings(folder, len(vocab))


def _tokenizer_model(folder: pathlib.Path) -> None:
    """A SentencePiece model with few pieces, as a protocol buffer written by hand."""
    named = {"<unk>": 2, "<s>": 3, "</s>": 3, "<y>": 4}
    pieces = [*named, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"thewafr", "th", "the"]
    content = b""
    for piece in pieces:
        kind = named.get(piece, 6 if piece.startswith("<0x") else 1)
        text = piece.encode()
        fields = b"\n" + bytes([len(text)]) + text + b"\x18" + bytes([kind])
        content += b"\n" + bytes([len(fields)]) + fields
    trainer = b"\x18\x02\x98\x02\x01"  # model_type 2, byte_fallback 1
    (folder / "tokenizer.model").write_bytes(content + b"\x12" + bytes([len(trainer)]) + trainer)
    _write_settings(folder, len(pieces))
