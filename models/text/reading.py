"""Load the tokenizer of a checkpoint, in whichever of four formats it comes."""

import base64
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from models.checkpoints.hub import find
from models.text import bpe
from models.text.tokenizer import Codec, FastCodec, Tokenizer, bytes_tokenizer
from wsekern.atomic_write import atomic_write

# Files that `copy_tokenizer` copies.
_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "chat_template.jinja",
)
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(checkpoint: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint; one token a byte if the checkpoint has none.

    These files are tried in order: tokenizer.json; vocab.json and merges.txt (or encoder.json and
    vocab.bpe); tokenizer.model, of SentencePiece or of tiktoken.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model on the Hugging Face hub.

    Raises:
      ValueError: a package is missing (the extra `hf` has it), or a file is not what its name says.
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
    """
    path = find(checkpoint)
    if path.is_file():
        from models.text.gguf_tokenizer import of_file

        return of_file(path)
    settings = _json(path / "tokenizer_config.json")
    names = {name: _content(settings.get(name)) for name in _TOKENS if settings.get(name)}
    codec, source = _codec(path, settings, names)
    if codec is None:
        return bytes_tokenizer()
    return Tokenizer(
        codec=codec,
        ends=_ends(path, codec, names),
        template=_template(path, settings),
        names=names,
        source=str(source),
    )


def copy_tokenizer(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the tokenizer of a checkpoint (a folder or a GGUF file) to another folder."""
    if checkpoint.is_file():
        load_tokenizer(checkpoint).save(folder)
        return
    for name in _FILES:
        if (checkpoint / name).exists():
            with atomic_write(folder / name) as file:
                file.write((checkpoint / name).read_bytes())


def _codec(
    folder: pathlib.Path, settings: dict[str, Any], names: dict[str, Any]
) -> tuple[Codec | None, pathlib.Path]:
    """The codec of a checkpoint's folder and the file it is from; None if there is no file."""
    file = folder / "tokenizer.json"
    if file.exists():
        tokenizers = _tokenizers(file)
        return FastCodec(_read(file, lambda: tokenizers.Tokenizer.from_file(str(file)))), file
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() and (folder / merges).exists():
            _tokenizers(folder / vocab)
            return _read(folder / vocab, functools.partial(_gpt2, folder, vocab, merges)), (
                folder / vocab
            )
    model = folder / "tokenizer.model"
    if model.exists():
        _tokenizers(model)
        return _read(model, lambda: _model(model, settings, names)), model
    return None, folder


def _gpt2(folder: pathlib.Path, vocab: str, merges: str) -> Codec:
    tokens = json.loads((folder / vocab).read_text(encoding="utf-8"))
    lines = (folder / merges).read_text(encoding="utf-8").split("\n")
    halves = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    pairs = [(left, right) for left, right in halves]
    special = [(name, tokens[name]) for name in ("<|endoftext|>",) if name in tokens]
    return FastCodec(bpe.byte_level(tokens, pairs, special=special))


def _model(file: pathlib.Path, settings: dict[str, Any], names: dict[str, Any]) -> Codec:
    """The codec of a tokenizer.model; fills in the names of its special tokens."""
    with file.open("rb") as stream:
        first = stream.readline().split()
    if len(first) == 2 and first[1].isdigit():  # lines of "token rank": tiktoken
        return _tiktoken(file)
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            f"{file} needs the sentencepiece library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    every = range(model.get_piece_size())
    special = [model.id_to_piece(i) for i in every if model.is_control(i)]
    add = settings.get("add_bos_token", True) and model.bos_id() >= 0
    names.setdefault("bos_token", model.id_to_piece(model.bos_id()) if add else "")
    if model.eos_id() >= 0:
        names.setdefault("eos_token", model.id_to_piece(model.eos_id()))
    return FastCodec(
        bpe.pieces(
            [model.id_to_piece(i) for i in every],
            [model.get_score(i) for i in every],
            special=special,
            unknown=model.id_to_piece(model.unk_id()),
            before=[model.bos_id()] if add else [],
        )
    )


def _tiktoken(file: pathlib.Path) -> Codec:
    """Llama 3's: the ranks of tokens, and 256 special tokens after them."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    vocab, merges = bpe.merges_of_ranks(ranks)
    special_names = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    count = iter(range(256))
    special = [
        f"<|{special_names[i]}|>"
        if i in special_names
        else f"<|reserved_special_token_{next(count)}|>"
        for i in range(256)
    ]
    tokens = [(name, len(ranks) + i) for i, name in enumerate(special)]
    return FastCodec(
        bpe.byte_level(vocab, merges, cut="llama3", special=tokens, before=[len(ranks)])
    )


def _ends(folder: pathlib.Path, codec: Codec, names: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text, from generation_config.json or else config.json."""
    for file in ("generation_config.json", "config.json"):
        ends = _json(folder / file).get("eos_token_id")
        if ends is not None:
            return tuple(ends) if isinstance(ends, list) else (int(ends),)
    end = names.get("eos_token")
    return tuple(codec.encode(end, False)[:1]) if end else ()


def _template(folder: pathlib.Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a checkpoint."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {one.get("name"): one.get("template") for one in template}
        return by_name.get("default")
    return template


def _json(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    fields = _read(file, lambda: json.loads(file.read_text(encoding="utf-8")))
    return fields if isinstance(fields, dict) else {}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read(file: pathlib.Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{file} cannot be read: {error}") from error


def _tokenizers(file: pathlib.Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f"{file} needs the tokenizers library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
    return tokenizers
