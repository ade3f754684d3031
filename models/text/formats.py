"""Build a tokenizer from the files of each format that a checkpoint's vocabulary comes in."""

import base64
import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from models.checkpoints.json_file import file_size, refuse_pointer, shown
from models.text import bpe, sentencepiece_model
from models.text.limits import check_tokens
from models.text.special_tokens import SpecialTokens, read_json
from wsekern.error_line import printable

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
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
# Classes whose settings count, and not those of their tokenizer.json.
_CLASSES_OF_BYTES = (*filter(None, _SPLIT_OF_CLASS), "GPTNeoXTokenizer")
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
    "GPTNeoXTokenizer": _GPT2_NAMES | {"pad_token": "<|padding|>"},
}
_MOST = 100_000_000  # bytes of a file; the largest vocabularies have a third of them
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


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a vocabulary's file, before special tokens are added."""

    inner: Any  # a `tokenizers.Tokenizer`
    special: SpecialTokens  # with the names that the format adds
    # Whether a text begins with `bos_token` if no file says so; None: `inner` has that in itself.
    begins: bool | None = None
    normalizer: Any = None  # takes the place of that of `inner`, and no file can hold it


def build(file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]) -> Vocabulary:
    """The tokenizer of a vocabulary's file, before special tokens are added.

    Args:
      file: tokenizer.json, vocab.json (its merges beside it), or tokenizer.model.
      special: the special tokens that the files beside it name.
      model: the content of config.json.

    Raises:
      ValueError: the file is damaged, too large, or of a tokenizer that is not read.
    """
    formats = {"tokenizer.json": _tokenizer_json, "tokenizer.model": _tokenizer_model}
    return formats.get(file.name, _vocab_and_merges)(file, special, model)


def read_checked(file: pathlib.Path, read: Callable[[], Any]) -> Any:
    """What `read` makes of a file.

    Raises:
      ValueError: the file is too large or no file of its own, or `read` raises anything.
    """
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


def _tokenizer_json(
    file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]
) -> Vocabulary:
    from tokenizers import Tokenizer

    _check_size(file)
    check_tokens(file)
    inner = read_checked(file, lambda: Tokenizer.from_file(str(file)))
    kind = _tokenizer_class(special)
    if not special.settings.get("tokenizer_class"):
        kind = _CLASS_OF_MODEL_TYPE.get(str(model.get("model_type")), "")
    named = {} if inner.padding is None else {"pad_token": inner.padding["pad_token"]}
    for name, token in _NAMES_OF_CLASS.get(kind, {}).items():
        if kind in _CLASSES_OF_BYTES or inner.token_to_id(token) is not None:
            named[name] = token
    special = _with_names(special, named)
    words = inner.pre_tokenizer
    if kind in _CLASSES_OF_BYTES and type(words).__name__ == "ByteLevel":
        # As in transformers: the class decides, and not its file.
        words.add_prefix_space = bool(special.settings.get("add_prefix_space", False))
        inner.pre_tokenizer = words
    if kind == "GPTNeoXTokenizer":
        _follow_gpt_neox(inner, special, file)
    inner.no_truncation()
    inner.no_padding()
    if getattr(inner.model, "dropout", None) is not None:
        inner.model.dropout = None
    return Vocabulary(inner, special)


def _follow_gpt_neox(inner: Any, special: SpecialTokens, file: pathlib.Path) -> None:
    """Does what GPT-NeoX's class does, whatever the file says.

    Raises:
      ValueError: a token is to begin or end a text, which only some versions of the class add.
    """
    from tokenizers import normalizers

    for name in ("add_bos_token", "add_eos_token"):
        if special.settings.get(name):
            raise ValueError(
                f"{file.with_name('tokenizer_config.json')}: {name} is true, which transformers 4 "
                "follows for GPTNeoXTokenizer and transformers 5 does not; set it to false, or "
                "tokenizer_class to PreTrainedTokenizerFast, whose post_processor in "
                "tokenizer.json may add the token"
            )
    inner.normalizer = normalizers.NFC()
    inner.post_processor = None


def _vocab_and_merges(
    file: pathlib.Path, special: SpecialTokens, model: dict[str, Any]
) -> Vocabulary:
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
    halves = file.with_name(dict(PAIRS)[file.name])
    merges = read_checked(halves, lambda: _merges(halves))
    prefix = bool(special.settings.get("add_prefix_space"))
    inner = read_checked(file, lambda: bpe.byte_level(vocab, merges, cut=split, prefix=prefix))
    if split == "qwen2":
        inner.normalizer = normalizers.NFC()
    if kind or _GPT2_END in vocab:
        special = _with_names(special, _NAMES_OF_CLASS[kind or "GPT2Tokenizer"])
    return Vocabulary(inner, special, False)


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
) -> Vocabulary:
    """Of SentencePiece, or of tiktoken."""
    _check_size(file)
    with file.open("rb") as stream:
        first = stream.readline(1000).split()
    if len(first) == 2 and first[1].isdigit():  # lines of "token rank": tiktoken
        return read_checked(file, lambda: _tiktoken(file, special))
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
    normalizer = read_checked(
        file, lambda: sentencepiece_model.exact_normalizer(pieces, legacy=legacy)
    )
    inner = read_checked(file, lambda: sentencepiece_model.build(pieces, legacy=legacy))
    numbers = {"bos_token": pieces.begin, "eos_token": pieces.end, "unk_token": pieces.unknown}
    special = _with_names(special, {n: pieces.pieces[i] for n, i in numbers.items() if i >= 0})
    if pieces.dummy_prefix:
        special = special.matched_before_normalization()
    return Vocabulary(inner, special, pieces.begin >= 0, normalizer)


def _tiktoken(file: pathlib.Path, special: SpecialTokens) -> Vocabulary:
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
    return Vocabulary(inner, special, "bos_token" in special.names)


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
