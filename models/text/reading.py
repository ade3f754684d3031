"""Load the tokenizer of a checkpoint, in whichever of four formats it comes."""

import functools
import importlib
import os
import pathlib
from typing import Any

from models.checkpoints.hub import find
from models.checkpoints.json_file import is_there, shown
from models.text.formats import PAIRS, build, read_checked
from models.text.limits import check_growth
from models.text.special_tokens import SpecialTokens, read_json, read_special_tokens
from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer
from wsekern.atomic_write import atomic_write

# Files that hold a vocabulary in a format that is not read.
_UNREAD = ("vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken")
# Files that `copy_tokenizer` copies, besides the folder of further chat templates.
_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    *(name for pair in PAIRS for name in pair),
    *_UNREAD,
    "chat_template.jinja",
    "chat_template.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
_MOST_TOKENS = 2_000_000  # the largest vocabularies have an eighth of them


def load_tokenizer(checkpoint: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint; one token a byte if the checkpoint has none.

    These files are tried in order: tokenizer.json; vocab.json and merges.txt (or encoder.json and
    vocab.bpe); tokenizer.model, of SentencePiece or of tiktoken. Tokens are those of
    `transformers`: special and added tokens are as tokenizer_config.json, special_tokens_map.json
    and added_tokens.json say. What tokenizer.json keeps of training, truncation, padding and
    dropout, is off.

    Args:
      checkpoint: a folder, a GGUF file, or the id of a model on the Hugging Face hub.

    Raises:
      ValueError: a package is missing (the extra `hf` has it), a file is not what its name says or
        contradicts another, the format is one that is not read, or the tokenizer could make a text
        1,000 times as long or has 100,000 added tokens.
      FileNotFoundError: there is no such folder or file, and no such model on the hub.
    """
    path = find(checkpoint)
    if path.is_file():
        from models.text.gguf_tokenizer import of_file

        _require_tokenizers(path)
        return of_file(path)
    source = _vocabulary(path)
    if source is None:
        return bytes_tokenizer()
    _require_tokenizers(source)
    special, model = read_special_tokens(path), read_json(path / "config.json")
    vocabulary = build(source, special, model)
    inner, special = vocabulary.inner, vocabulary.special
    check_growth(inner, source)
    room = model.get("vocab_size")
    unnumbered = special.add_to(inner, room if type(room) is int else None, source)
    settings = special.settings
    if vocabulary.begins is not None:
        _begin_and_end(inner, special, source, vocabulary.begins)
    size = max(inner.get_vocab().values(), default=-1) + 1
    if size > _MOST_TOKENS:  # `tokenizers` saves them with a step for each number
        raise ValueError(
            f"{source} numbers a token {size - 1:,}; at most {_MOST_TOKENS:,} are read"
        )
    if outside := [
        token for token in read_checked(source, lambda: inner.encode("").ids) if token >= size
    ]:
        raise ValueError(f"{source} adds token {outside[0]} to every text, and has {size} tokens")
    inner.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    # As in transformers, which cleans up after no byte-pair encoding.
    clean_up = type(inner.model).__name__ != "BPE" and settings.get("clean_up_tokenization_spaces")
    codec = FastCodec(inner)
    if vocabulary.normalizer is not None:
        codec = FastCodec(inner, written=inner.to_str(pretty=True))
        inner.normalizer = vocabulary.normalizer
    end = special.names.get("eos_token")
    templates = _templates(path, settings)
    return Tokenizer(
        codec=codec,
        ends=_ends(path, None if end in unnumbered else inner.token_to_id(end or "")),
        template=templates.pop("default", None),
        templates=templates,
        names=special.names,
        clean_up=bool(clean_up),
        source=str(source),
    )


def copy_tokenizer(checkpoint: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the tokenizer of a checkpoint (a folder or a GGUF file) to another folder."""
    if checkpoint.is_file():
        load_tokenizer(checkpoint).save(folder)
        return
    templates = sorted(checkpoint.glob(f"{_MORE_TEMPLATES}/*.jinja"))
    for file in [*(checkpoint / name for name in _FILES), *templates]:
        if is_there(file):
            target = folder / file.relative_to(checkpoint)
            target.parent.mkdir(exist_ok=True)
            with atomic_write(target) as out:
                out.write(file.read_bytes())


def _vocabulary(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that holds the vocabulary of a checkpoint's folder; None if it has no tokenizer."""
    names = ["tokenizer.json"]
    names += [vocab for vocab, merges in PAIRS if is_there(folder / merges)]
    for name in [*names, "tokenizer.model"]:
        if is_there(folder / name):
            return folder / name
    for vocab, merges in PAIRS:
        if is_there(folder / vocab):
            raise ValueError(f"{folder / merges} is missing, the other half of {vocab}")
        if is_there(folder / merges):
            raise ValueError(f"{folder / vocab} is missing, the other half of {merges}")
    for name in [*_UNREAD, "tokenizer_config.json"]:
        if is_there(folder / name):
            raise ValueError(
                f"{folder / name}: no vocabulary that is read stands beside it; save the tokenizer "
                "with transformers as tokenizer.json"
            )
    return None


def _begin_and_end(inner: Any, special: SpecialTokens, file: pathlib.Path, begin: bool) -> None:
    """Has the tokenizer add the tokens that begin and end a text.

    Args:
      inner: a `tokenizers.Tokenizer`.
      special: says whether to, and which tokens they are.
      file: the vocabulary's, for error messages.
      begin: whether a text has a token that begins it if the files do not say so.
    """
    from tokenizers import processors

    parts, used = ["$A"], list[dict[str, Any]]()
    for side, default in (("bos", begin), ("eos", False)):
        name = special.names.get(f"{side}_token")
        if name is None or not special.settings.get(f"add_{side}_token", default):
            continue
        number = inner.token_to_id(name)
        if number is None:
            raise ValueError(
                f"{file.parent}: add_{side}_token is true, but {side}_token is {name!r}, which the "
                "vocabulary lacks"
            )
        # Under names of our own: in a token's, what follows a colon would be read as a number.
        used.append({"id": side, "ids": [number], "tokens": [name]})
        parts = [side, *parts] if side == "bos" else [*parts, side]
    if used:
        inner.post_processor = processors.TemplateProcessing(single=parts, special_tokens=used)


def _ends(folder: pathlib.Path, end: int | None) -> tuple[int, ...]:
    """The tokens that end a text, from generation_config.json or config.json, or else `end`."""
    room = read_json(folder / "config.json").get("vocab_size")
    for file in ("generation_config.json", "config.json"):
        ends = read_json(folder / file).get("eos_token_id")
        if ends is None:
            continue
        several = ends if isinstance(ends, list) else [ends]
        if not all(type(one) is int for one in several):
            raise ValueError(
                f"{folder / file}: eos_token_id is {shown(ends)}; it must be a number, or a list "
                "of them"
            )
        if type(room) is int and max(several, default=0) >= room:
            raise ValueError(
                f"{folder / file}: eos_token_id is {shown(ends)}, and the model has {room:,} "
                "tokens: none would end a text"
            )
        return tuple(dict.fromkeys(one for one in several if one >= 0))
    return () if end is None else (end,)


def _templates(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """The chat templates of a checkpoint by name; the usual one is "default"."""
    files = {file.stem: file for file in sorted(folder.glob(f"{_MORE_TEMPLATES}/*.jinja"))}
    if is_there(folder / "chat_template.jinja"):
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {
            name: read_checked(file, functools.partial(file.read_text, encoding="utf-8"))
            for name, file in files.items()
        }
    templates = settings.get("chat_template") or {}
    if isinstance(templates, str):
        return {"default": templates}
    if isinstance(templates, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in templates
    ):
        templates = {one["name"]: one.get("template") for one in templates}
    if not isinstance(templates, dict) or not all(
        isinstance(part, str) for pair in templates.items() for part in pair
    ):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {shown(templates)}; it must "
            "be a text, or a list of objects with `name` and `template`"
        )
    return dict(templates)


def _require_tokenizers(file: pathlib.Path) -> None:
    try:
        importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(
            f"{file} needs the tokenizers library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
