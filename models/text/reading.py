"""This file is tokenizers read from checkpoints, whichever way they keep them."""

import base64
import json
import pathlib
import shutil
from typing import Any

from models.text import bpe
from models.text.tokenizer import Codec, FastCodec, Tokenizer, bytes_tokenizer

# What goes with a checkpoint's weights.
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


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder or GGUF file; bytes, where it has none.

    Looked for in this order: tokenizer.json, vocab.json and merges.txt (or encoder.json and
    vocab.bpe), tokenizer.model of SentencePiece or of tiktoken.

    Raises:
      ValueError: a package is missing, or a file is not what its name says.
    """
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
    """Writes the tokenizer of a checkpoint's folder or GGUF file into another folder."""
    if checkpoint.is_file():
        load_tokenizer(checkpoint).save(folder)
        return
    for name in _FILES:
        if (checkpoint / name).exists():
            shutil.copyfile(checkpoint / name, folder / name)


def _codec(folder, settings, names) -> tuple[Codec | None, pathlib.Path]:
    whole = folder / "tokenizer.json"
    if whole.exists():
        tokenizers = _tokenizers(whole)
        return FastCodec(_read(whole, lambda: tokenizers.Tokenizer.from_file(str(whole)))), whole
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).exists() and (folder / merges).exists():
            _tokenizers(folder / vocab)
            return _read(folder / vocab, lambda v=vocab, m=merges: _gpt2(folder, v, m)), (
                folder / vocab
            )
    model = folder / "tokenizer.model"
    if model.exists():
        _tokenizers(model)
        return _read(model, lambda: _model(model, settings, names)), model
    return None, folder


def _gpt2(folder, vocab, merges) -> Codec:
    tokens = json.loads((folder / vocab).read_text(encoding="utf-8"))
    lines = (folder / merges).read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    special = [(name, tokens[name]) for name in ("<|endoftext|>",) if name in tokens]
    return FastCodec(bpe.byte_level(tokens, pairs, special=special))


def _model(file, settings, names) -> Codec:
    with file.open("rb") as stream:
        first = stream.readline().split()
    if len(first) == 2 and first[1].isdigit():
        return _tiktoken(file)
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            f'{file} is of SentencePiece, which is not installed: pip install "wsekern[hf]"'
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


def _tiktoken(file) -> Codec:
    """Llama 3's: ranks of tokens, and 256 special ones behind them."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    vocab, merges = bpe.merges_of_ranks(ranks)
    named = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id"}
    named |= {7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
    count = iter(range(256))
    special = [
        f"<|{named[i]}|>" if i in named else f"<|reserved_special_token_{next(count)}|>"
        for i in range(256)
    ]
    tokens = [(name, len(ranks) + i) for i, name in enumerate(special)]
    return FastCodec(
        bpe.byte_level(vocab, merges, cut="llama3", special=tokens, before=[len(ranks)])
    )


def _ends(folder, codec, names) -> tuple[int, ...]:
    """The tokens that end a text: what generation_config.json says, else config.json."""
    for file in ("generation_config.json", "config.json"):
        found = _json(folder / file).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    end = names.get("eos_token")
    return tuple(codec.encode(end, False)[:1]) if end else ()


def _template(folder, settings) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found}
        return named.get("default")
    return found


def _json(file: pathlib.Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    found = _read(file, lambda: json.loads(file.read_text(encoding="utf-8")))
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else token


def _read(file: pathlib.Path, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # `tokenizers` raises bare Exception for what it cannot read
        raise ValueError(f"{file} cannot be read: {error}") from error


def _tokenizers(file: pathlib.Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            f'{file} needs the tokenizers library: pip install "wsekern[hf]"'
        ) from None
    return tokenizers
