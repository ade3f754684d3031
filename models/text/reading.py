"""Load the tokenizer of a checkpoint, in whichever of four formats it comes."""

import base64
import dataclasses
import functools
import importlib
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from models.checkpoints.hub import find
from models.checkpoints.json_file import file_size, is_there, refuse_pointer, shown
from models.text import bpe, sentencepiece_model
from models.text.limits import check_growth, check_tokens
from models.text.special_tokens import SpecialTokens, read_json, read_special_tokens
from models.text.tokenizer import FastCodec, Tokenizer, bytes_tokenizer
from wsekern.atomic_write import atomic_write
from wsekern.error_line import printable

_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
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
    *(name for pair in _PAIRS for name in pair),
    *_UNREAD,
    "chat_template.jinja",
    "chat_template.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
# Classes of `transformers` whose vocab.json and merges.txt mean what they do here, and how each
# splits text into words, by GGUF's name.
_SPLIT_OF_CLASS = {
    "": "gpt-2",
    "GPT2Tokenizer": "gpt-2",
    "CodeGenTokenizer": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
}
# The class of a model's tokenizer, if no file names it.
_CLASS_OF_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen2_moe": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen3_moe": "Qwen2Tokenizer",
}
# Models whose vocabulary means the same if no file names a class.
_MODELS_OF_PAIRS = ("gpt_oss", "llama", *_CLASS_OF_MODEL_TYPE)
_MODELS_OF_PIECES = ("llama", "mistral", "mixtral", "gemma", "gemma2")
_CLASSES_OF_PIECES = ("", "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")  # these say nothing of the format
_GPT2_END = "<|endoftext|>"
_GPT2_NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _GPT2_END)
_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Special tokens that a class of `transformers` has unless the files say otherwise.
_NAMES_OF_CLASS = {
    "GPT2Tokenizer": _GPT2_NAMES,
    "CodeGenTokenizer": _GPT2_NAMES,
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _GPT2_END),
    "LlamaTokenizer": _LLAMA_NAMES,
    "CodeLlamaTokenizer": _LLAMA_NAMES,
}
_MOST = 100_000_000  # bytes of a file; the largest vocabularies have a third of them
_MOST_TOKENS = 2_000_000  # the largest vocabularies have an eighth of them
_MOST_SPECIAL = 10_000  # special tokens that follow tiktoken's ranks; Llama 3 has 256
# Of Llama 3's special tokens, those that have names.
_LLAMA3_SPECIAL = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}


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
    build = {"tokenizer.json": _tokenizer_json, "tokenizer.model": _tokenizer_model}
    inner, special, begin = build.get(source.name, _vocab_and_merges)(source, special, model)
    check_growth(inner, source)
    room = model.get("vocab_size")
    unnumbered = special.add_to(inner, room if type(room) is int else None, source)
    settings = special.settings
    if begin is not None:
        _begin_and_end(inner, special, source, begin)
    size = max(inner.get_vocab().values(), default=-1) + 1
    if size > _MOST_TOKENS:  # `tokenizers` saves them with a step for each number
        raise ValueError(
            f"{source} numbers a token {size - 1:,}; at most {_MOST_TOKENS:,} are read"
        )
    if outside := [token for token in _read(source, lambda: inner.encode("").ids) if token >= size]:
        raise ValueError(f"{source} adds token {outside[0]} to every text, and has {size} tokens")
    inner.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    # As in transformers, which cleans up after no byte-pair encoding.
    clean_up = type(inner.model).__name__ != "BPE" and settings.get("clean_up_tokenization_spaces")
    end = special.names.get("eos_token")
    templates = _templates(path, settings)
    return Tokenizer(
        codec=FastCodec(inner),
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
    names += [vocab for vocab, merges in _PAIRS if is_there(folder / merges)]
    for name in [*names, "tokenizer.model"]:
        if is_there(folder / name):
            return folder / name
    for vocab, merges in _PAIRS:
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


# Each of the three formats gives a `tokenizers.Tokenizer`, the special tokens with the names that
# the format adds, and whether a text begins with `bos_token` if no file says so (None: the
# tokenizer has that in itself).
def _tokenizer_json(
    file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]
) -> tuple[Any, SpecialTokens, bool | None]:
    from tokenizers import Tokenizer

    _check_size(file)
    check_tokens(file)
    inner = _read(file, lambda: Tokenizer.from_file(str(file)))
    kind = _tokenizer_class(special)
    if not special.settings.get("tokenizer_class"):
        kind = _CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")), "")
    named = {} if inner.padding is None else {"pad_token": inner.padding["pad_token"]}
    for name, token in _NAMES_OF_CLASS.get(kind, {}).items():
        if kind in _SPLIT_OF_CLASS or inner.token_to_id(token) is not None:
            named[name] = token
    special = _with_names(special, named)
    words = inner.pre_tokenizer
    if kind and kind in _SPLIT_OF_CLASS and type(words).__name__ == "ByteLevel":
        # As in transformers: the class decides, and not its file.
        words.add_prefix_space = bool(special.settings.get("add_prefix_space", False))
        inner.pre_tokenizer = words
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    return inner, special, None


def _vocab_and_merges(
    file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]
) -> tuple[Any, SpecialTokens, bool | None]:
    """GPT-2's two files, or Qwen2's."""
    from tokenizers import normalizers

    kind = _tokenizer_class(special)
    if not kind:
        _check_model_type(file, model, _MODELS_OF_PAIRS)
        kind = _CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")), "")
    split = _SPLIT_OF_CLASS.get(kind)
    if split is None:
        raise _unknown_class(file, special, _SPLIT_OF_CLASS)
    vocab = read_json(file)
    for token, number in vocab.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"{file}: {shown(token)} is {shown(number)}; it must be its number")
    halves = file.with_name(dict(_PAIRS)[file.name])
    merges = _read(halves, lambda: _merges(halves))
    prefix = bool(special.settings.get("add_prefix_space"))
    inner = _read(file, lambda: bpe.byte_level(vocab, merges, cut=split, prefix=prefix))
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    if kind or _GPT2_END in vocab:
        special = _with_names(special, _NAMES_OF_CLASS[kind or "GPT2Tokenizer"])
    return inner, special, False


def _merges(file: pathlib.Path) -> list[tuple[str, str]]:
    lines = [line.rstrip("\r") for line in file.read_text(encoding="utf-8").split("\n")]
    merges = []
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#version"):
            left, *right = line.split(" ")
            if len(right) != 1:
                raise ValueError(f"line {number} is {shown(line)}; it must be two tokens")
            merges.append((left, right[0]))
    return merges


def _tokenizer_model(
    file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]
) -> tuple[Any, SpecialTokens, bool | None]:
    """Of SentencePiece, or of tiktoken."""
    _check_size(file)
    with file.open("rb") as stream:
        first = stream.readline(1000).split()
    if len(first) == 2 and first[1].isdigit():  # lines of "token rank": tiktoken
        return _read(file, lambda: _tiktoken(file, special))
    if _tokenizer_class(special) not in _CLASSES_OF_PIECES:
        raise _unknown_class(file, special, _CLASSES_OF_PIECES)
    if not _tokenizer_class(special):
        _check_model_type(file, model, _MODELS_OF_PIECES)
    if options := special.settings.get("sp_model_kwargs"):
        raise ValueError(
            f"{file.with_name('tokenizer_config.json')}: sp_model_kwargs is {shown(options)}; only "
            "an empty one is supported"
        )
    pieces = sentencepiece_model.read_model(file)
    if special.settings.get("add_prefix_space") is False:
        pieces = dataclasses.replace(pieces, dummy_prefix=False)
    # A number of a piece that the files name is a placeholder's, such as "<unused7>".
    kept = {name for i, name in enumerate(pieces.pieces) if i not in special.numbers}
    renamed = {i: name for i, name in special.numbers.items() if name not in kept}
    pieces = dataclasses.replace(
        pieces, pieces=tuple(renamed.get(i, name) for i, name in enumerate(pieces.pieces))
    )
    legacy = special.settings.get("legacy") is not False
    inner = _read(file, lambda: sentencepiece_model.build(pieces, legacy=legacy))
    numbers = {"bos_token": pieces.begin, "eos_token": pieces.end, "unk_token": pieces.unknown}
    special = _with_names(special, {n: pieces.pieces[i] for n, i in numbers.items() if i >= 0})
    if pieces.dummy_prefix:
        special = special.matched_before_normalization()
    return inner, special, pieces.begin >= 0


def _tiktoken(file: pathlib.Path, special: SpecialTokens) -> tuple[Any, SpecialTokens, bool | None]:
    """Llama 3's: the ranks of tokens, and after them 256 special tokens, or those of the files."""
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        token, _, rank = line.strip().partition(b" ")
        if token and not (rank.isdigit() and len(rank) < 10):
            raise ValueError(f"line {number} is {shown(line)}; it must be a token and its rank")
        if token:
            ranks[base64.b64decode(token)] = int(rank)
    vocab, merges = bpe.merges_of_ranks(ranks)
    first = len(ranks)
    if sorted(ranks.values()) != list(range(first)):
        raise ValueError(f"its {first} tokens are not numbered from 0 to {first - 1}")
    if max(special.numbers, default=0) >= first:
        count = max(special.numbers) + 1 - first
        if count > _MOST_SPECIAL:
            raise ValueError(
                f"added token {max(special.numbers)} is {count:,} beyond its {first:,} tokens"
            )
        names = {i: f"<|reserved_token_{i}|>" for i in range(first, first + count)}
    else:
        reserved = iter(range(256))
        names = {
            first + i: f"<|{_LLAMA3_SPECIAL[i]}|>"
            if i in _LLAMA3_SPECIAL
            else f"<|reserved_special_token_{next(reserved)}|>"
            for i in range(256)
        }
        special = _with_names(special, {"bos_token": names[first], "eos_token": names[first + 1]})
    tokens = [(special.numbers.get(i, name), i) for i, name in names.items()]
    inner = bpe.byte_level(vocab, merges, cut="llama3", special=tokens)
    return inner, special, "bos_token" in special.names


def _tokenizer_class(special: SpecialTokens) -> str:
    """The class of `transformers` that the files name; empty if it says nothing of the format."""
    name = str(special.settings.get("tokenizer_class") or "").removesuffix("Fast")
    return "" if name in _GENERIC_CLASSES else name


def _check_model_type(file: pathlib.Path, model: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises ValueError if config.json is of a model that reads the vocabulary in another way."""
    kind = model.get("model_type")
    if kind is not None and kind not in known:
        raise ValueError(
            f"{file.with_name('config.json')}: model_type is {shown(kind)}, and no file names a "
            f"tokenizer_class; of {file.name} without one, only that of {', '.join(known)} is "
            "read: save the tokenizer with transformers as tokenizer.json"
        )


def _unknown_class(file: pathlib.Path, special: SpecialTokens, known: Iterable[str]) -> ValueError:
    return ValueError(
        f"{file.with_name('tokenizer_config.json')}: tokenizer_class is "
        f"{special.settings['tokenizer_class']!r}; of {file.name}, only "
        f"{', '.join(filter(None, known))} are read: save the tokenizer with transformers as "
        "tokenizer.json"
    )


def _with_names(special: SpecialTokens, defaults: dict[str, str]) -> SpecialTokens:
    """`special` with the names that its files do not mention; a name that is null stays out."""
    unsaid = {name: token for name, token in defaults.items() if name not in special.settings}
    return dataclasses.replace(special, names=unsaid | special.names)


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
            name: _read(file, functools.partial(file.read_text, encoding="utf-8"))
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


def _read(file: pathlib.Path, read: Callable[[], Any]) -> Any:
    _check_size(file)
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exceptions, and Rust's panics
        raise ValueError(f"{file} cannot be read: {printable(str(error))}") from error


def _check_size(file: pathlib.Path) -> None:
    size = file_size(file)  # refuses a FIFO, which would never end
    if size > _MOST:
        raise ValueError(f"{file} has {size:,} bytes, more than the {_MOST:,} that it may have")
    with file.open("rb") as stream:
        refuse_pointer(stream.read(32), str(file))


def _require_tokenizers(file: pathlib.Path) -> None:
    try:
        importlib.import_module("tokenizers")
    except ImportError:
        raise ValueError(
            f"{file} needs the tokenizers library; in the checkout, run "
            "`pip install -e '.[hf]' -c constraints.txt`"
        ) from None
