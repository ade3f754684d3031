"""Tokens and batches: tokenize text once into a cached memory map, and draw batches from it.

A batch depends on the seed and the step alone, so a run resumes on any number of hosts. Random
bits: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import typing
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Integer

from models.checkpoints.json_file import file_size, read_json
from models.text.characters import save_characters
from models.text.reading import copy_tokenizer
from models.text.tokenizer import Tokenizer, bytes_tokenizer
from training.corpus import Document, find_sources, read_documents, read_text, split_documents
from wsekern.progress import show_progress

Tokens = Literal["bytes", "characters"]
Pair = tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]  # inputs, and the token after each

_FORMAT = 3  # version of the cache; raise it when it stores the same text otherwise
_ABOUT = "corpus.json"
_BLOCK = 1 << 24  # bytes that share a checksum


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokenized text for training and for validation; the tokens stay on disk until they are read.

    Make one with `open_corpus`.
    """

    train: Integer[np.ndarray, " N"]  # a read-only memory map of uint8, uint16 or uint32
    validation: Integer[np.ndarray, " V"]
    vocab: int  # number of different tokens possible
    name: str  # of the data, for people
    alphabet: str | None  # the character of each token; None: tokens are bytes or a tokenizer's
    fingerprint: str  # of all tokens; equal for two corpora exactly if they train alike
    skipped: tuple[str, ...]  # a line for each file without text
    tokenizer: Tokenizer | None = None  # None: tokens are bytes or characters

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """The tokens of `text`, int32.

        Raises:
          ValueError: `text` has characters that the vocabulary lacks, or half a surrogate pair.
        """
        if self.tokenizer is not None:
            return np.asarray(self.tokenizer.encode(text), np.int32)
        if self.alphabet is None:
            return np.asarray(bytes_tokenizer().encode(text), np.int32)
        missing = sorted(set(text) - set(self.alphabet))
        if missing:
            raise ValueError(
                f"{''.join(missing)!r} is not in the {self.vocab} characters of {self.name}; leave "
                "these characters out, or use tokens='bytes'"
            )
        return _tokenize(text, self.alphabet).astype(np.int32)

    def decode(self, tokens: Int[np.ndarray, " T"] | Sequence[int]) -> str:
        """The text of `tokens`; bytes that are not UTF-8 (half a character) become U+FFFD.

        Of bytes, tokens above 255 are left out: a model with a larger vocabulary may draw them.
        """
        if self.tokenizer is not None:
            return self.tokenizer.decode(tokens)
        if self.alphabet is None:
            return bytes_tokenizer().decode(tokens)
        return "".join(self.alphabet[token] for token in np.asarray(tokens))

    def save_tokenizer(self, folder: pathlib.Path, checkpoint: pathlib.Path | None) -> None:
        """Writes to `folder` what `load_tokenizer` needs to make these tokens; of bytes, nothing.

        Args:
          folder: a model's.
          checkpoint: where the tokenizer was read from; None: there is none.
        """
        if self.alphabet is not None:
            save_characters(self.alphabet, folder)
        elif self.tokenizer is not None and checkpoint is not None:
            copy_tokenizer(checkpoint, folder)


def open_corpus(
    sources: str | Sequence[str] | None = None,
    *,
    tokens: Tokens | Tokenizer = "bytes",
    context: int,
    validation_fraction: float = 0.1,
    cache: str | pathlib.Path | None = None,
) -> Corpus:
    """The tokens of `sources`: made the first time, afterwards mapped from the cache.

    The cache holds as long as all files are the same: paths, sizes, times of change, inodes.
    Its checksums are compared each time, at 2 GB a second or so; a damaged cache is made anew.
    Several processes may open the same corpus at once.

    Args:
      sources: files, directories and glob patterns of UTF-8 text; None: the Python sources of the
        interpreter's standard library, about 30 MB.
      tokens: the kind of token. "characters": the vocabulary is the characters in the text, sorted.
        A tokenizer: each file is followed by the token that ends a text.
      context: tokens in a sequence; each part must hold a sequence and the token after it.
      validation_fraction: share of the bytes for validation: whole files, or the end of a single
        file.
      cache: folder of all cached corpora; None: $WSEKERN_CACHE, or ~/.cache/wsekern.

    Raises:
      FileNotFoundError: a source is not there.
      ValueError: a named file is empty, unreadable or not text, or there is too little text.
      OSError: the cache cannot be written.
    """
    tokenizer = tokens if isinstance(tokens, Tokenizer) else None
    if tokenizer is None and tokens not in typing.get_args(Tokens):
        raise ValueError(f"tokens={tokens!r} is not one of {typing.get_args(Tokens)}")
    data = (sources,) if isinstance(sources, str) else tuple(sources or ())
    name, files = find_sources(data)
    stamps = [(source.stamp(), source.named) for source in files]
    kind = tokens if tokenizer is None else tokenizer.fingerprint
    key = json.dumps([_FORMAT, kind, validation_fraction, data, stamps])
    home = pathlib.Path(cache or os.environ.get("WSEKERN_CACHE") or "~/.cache/wsekern").expanduser()
    folder = home / f"corpus-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    corpus = _open_cached(folder)
    if corpus is None:
        with show_progress(f"tokenizing {name}"):
            documents, skipped = read_documents(files, " + ".join(data) or name)
            parts = split_documents(documents, validation_fraction)
            alphabet = _alphabet(documents, tokens)
            about: dict[str, Any] = {"name": name, "skipped": skipped, "alphabet": alphabet}
            about["vocab"] = _vocab(alphabet, tokenizer)
            corpus = _store(folder, parts, validation_fraction, about, tokenizer)
    corpus = dataclasses.replace(corpus, tokenizer=tokenizer)
    _check_long_enough(corpus, context)
    return corpus


def training_batch(
    tokens: Integer[np.ndarray, " N"],
    *,
    seed: int,
    step: int,
    batch: int,
    context: int,
    host: tuple[int, int] = (0, 1),
) -> Pair:
    """This host's rows of the batch of (`seed`, `step`): sequences at random places in `tokens`.

    The rows of all hosts together are the same batch for any number of hosts.

    Args:
      tokens: one part of a corpus.
      seed: the run's; the places depend on it and on the step, and on nothing else.
      step: which batch.
      batch: sequences over all hosts.
      context: tokens in a sequence.
      host: this host's index, and the number of hosts.

    Raises:
      ValueError: `batch` does not divide over the hosts.
    """
    rows = _rows_of_host(batch, host)
    # Raw bits: Philox defines their sequence, so it is the same in every release of numpy, unlike
    # that of `Generator.integers`.
    bits = np.random.Philox(key=np.array([seed, step], np.uint64)).random_raw(batch)
    starts = (bits % np.uint64(len(tokens) - context)).astype(np.int64)
    return _sequences(tokens, starts[rows], context)


def evaluation_batches(
    tokens: Integer[np.ndarray, " N"],
    *,
    batch: int,
    context: int,
    batches: int,
    host: tuple[int, int] = (0, 1),
) -> Iterator[Pair]:
    """Batches for evaluation: sequences spread evenly over `tokens`, not overlapping.

    Every call gives the same batches. There are fewer if the tokens do not fill `batches`; if they
    do not fill even one, its sequences repeat.

    Args:
      tokens: one part of a corpus.
      batch: sequences over all hosts.
      context: tokens in a sequence.
      batches: the most batches to give.
      host: this host's index, and the number of hosts.

    Raises:
      ValueError: `batch` does not divide over the hosts.
    """
    rows = _rows_of_host(batch, host)
    windows = (len(tokens) - 1) // context
    batches = max(1, min(batches, windows // batch))
    for first in range(0, batches * batch, batch):
        numbers = np.arange(first, first + batch)
        if windows >= batch:
            numbers = numbers * windows // (batches * batch)
        yield _sequences(tokens, (numbers % windows)[rows] * context, context)


def _rows_of_host(batch: int, host: tuple[int, int]) -> slice:
    index, count = host
    if batch % count or not 0 <= index < count:
        raise ValueError(
            f"batch={batch} does not divide over host={host} (index, hosts); use a batch that is a "
            "multiple of the hosts"
        )
    share = batch // count
    return slice(index * share, (index + 1) * share)


def _sequences(tokens: np.ndarray, starts: np.ndarray, context: int) -> Pair:
    rows = np.asarray(tokens)[starts[:, None] + np.arange(context + 1)].astype(np.int32)
    return np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])


def _alphabet(documents: Sequence[Document], tokens: Tokens | Tokenizer) -> str | None:
    if tokens != "characters":
        return None
    characters: set[str] = set()
    for document in documents:
        characters.update(read_text(document.path))
    if len(characters) > 1 << 16:
        raise ValueError(
            f"the text has {len(characters)} different characters, more than the {1 << 16} that "
            "16-bit tokens tell apart; use tokens='bytes'"
        )
    return "".join(sorted(characters))


def _vocab(alphabet: str | None, tokenizer: Tokenizer | None) -> int:
    if tokenizer is not None:
        return tokenizer.vocab
    return 256 if alphabet is None else len(alphabet)


def _tokenize(text: str, alphabet: str | None, tokenizer: Tokenizer | None = None) -> np.ndarray:
    if tokenizer is not None:
        return np.asarray([*tokenizer.encode(text), *tokenizer.ends[:1]], _dtype(tokenizer.vocab))
    if alphabet is None:
        return np.frombuffer(text.encode(), np.uint8)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    order = np.frombuffer(alphabet.encode("utf-32-le"), np.uint32)  # sorted, as alphabets are
    return np.searchsorted(order, points).astype(_dtype(len(alphabet)))


def _tokens_of(document: Document, alphabet: str | None, tokenizer: Tokenizer | None) -> np.ndarray:
    text = read_text(document.path)
    try:
        return _tokenize(text, alphabet, tokenizer)
    except ValueError as error:  # a character that the vocabulary lacks
        raise ValueError(f"data={str(document.path)!r}: {error}") from None


def _dtype(vocab: int) -> type[np.unsignedinteger]:
    return np.uint8 if vocab <= 1 << 8 else np.uint16 if vocab <= 1 << 16 else np.uint32


def _store(
    folder: pathlib.Path,
    parts: tuple[list[Document], list[Document]],
    validation_fraction: float,
    about: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> Corpus:
    """Writes the corpus beside `folder`, then renames it: other processes see all or nothing."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.partial"))
        try:
            _write(partial, parts, validation_fraction, about, tokenizer)
            _move(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OSError(
            f"the cache {folder.parent} cannot be written ({error}); set WSEKERN_CACHE to a folder "
            "that can, with room for the text"
        ) from error
    corpus = _open_cached(folder)
    if corpus is None:
        raise OSError(f"the cache {folder} changed while it was read; remove it and try again")
    return corpus


def _write(
    folder: pathlib.Path,
    parts: tuple[list[Document], list[Document]],
    validation_fraction: float,
    about: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    arrays_of: list[Iterable[np.ndarray]] = [
        (_tokens_of(document, about["alphabet"], tokenizer) for document in part) for part in parts
    ]
    if not parts[1]:
        [whole] = arrays_of[0]
        cut = int(len(whole) * (1 - validation_fraction))
        arrays_of = [[whole[:cut]], [whole[cut:]]]
    digest = hashlib.sha256(repr(about["alphabet"]).encode())
    about["crc32"] = {}
    for name, arrays in zip(("train", "validation"), arrays_of, strict=True):
        with (folder / f"{name}.bin").open("wb") as file:
            for array in arrays:
                file.write(array.tobytes())
                digest.update(array.tobytes())
            about[name] = file.tell()
        about["crc32"][name] = _checksums(folder / f"{name}.bin")
        digest.update(str(about[name]).encode())  # so that the fingerprint covers where a part ends
    about["fingerprint"] = digest.hexdigest()
    (folder / _ABOUT).write_text(json.dumps({**about, "sha256": _digest(about)}))


def _move(partial: pathlib.Path, folder: pathlib.Path) -> None:
    if _open_cached(folder) is not None:  # another process was faster
        return
    shutil.rmtree(folder, ignore_errors=True)  # if it is there, it is broken
    with contextlib.suppress(OSError):  # another process was faster after all
        partial.rename(folder)


def _open_cached(folder: pathlib.Path) -> Corpus | None:
    try:
        about = read_json(folder / _ABOUT)
        if about.pop("sha256") != _digest(about):
            return None
        parts = {
            name: _map_tokens(folder / f"{name}.bin", about[name], _dtype(about["vocab"]))
            for name in ("train", "validation")
        }
        if any(_checksums(folder / f"{name}.bin") != about["crc32"][name] for name in parts):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Corpus(
        train=parts["train"],
        validation=parts["validation"],
        vocab=about["vocab"],
        name=about["name"],
        alphabet=about["alphabet"],
        fingerprint=about["fingerprint"],
        skipped=tuple(about["skipped"]),
    )


def _checksums(path: pathlib.Path) -> list[int]:
    """The CRC-32 of each block of a file; blocks are read and summed in several threads."""
    size = file_size(path)
    mapped = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        blocks = (mapped[start : start + _BLOCK] for start in range(0, size, _BLOCK))
        return list(pool.map(zlib.crc32, blocks))


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _map_tokens(path: pathlib.Path, size: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
    return (
        np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
    )  # an empty file cannot be mapped


def _check_long_enough(corpus: Corpus, context: int) -> None:
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens) <= context:
            raise ValueError(
                f"the {name} part of {corpus.name} has {len(tokens)} tokens, fewer than one "
                f"sequence of context={context} and the token after it; give more text, a smaller "
                "context or another validation_fraction"
            )
