"""This file is the text that is trained on: which files, read one at a time, and on which side.

A file lies wholly in the training or wholly in the validation data, and equal files count once, so
that nothing leaks from the one into the other.
"""

import dataclasses
import glob
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

# Other people's packages and caches, which differ from machine to machine.
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, order=True)
class Source:
    """A file that may hold text."""

    path: pathlib.Path
    named: bool  # by the user, one by one: then it must be text, others may be skipped

    def stamp(self) -> tuple[str, int, int]:
        """What changes when the file does: its path, size in bytes and time of change in ns."""
        try:
            status = self.path.stat()
        except OSError:  # a broken link, say: reading it will tell
            return str(self.path), -1, -1
        return str(self.path.absolute()), status.st_size, status.st_mtime_ns


@dataclasses.dataclass(frozen=True)
class Document:
    """A file that does hold text."""

    path: pathlib.Path
    size: int  # bytes
    digest: str  # of its content


def find_sources(data: Sequence[str]) -> tuple[str, list[Source]]:
    """What the data is called, and its files in a fixed order.

    Args:
      data: files, directories (all files in them, hidden ones left out) and glob patterns; none at
        all stands for the Python sources of the interpreter's standard library.

    Raises:
      FileNotFoundError: one of `data` is not there, or matches nothing.
    """
    if not data:
        version = sysconfig.get_python_version()
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        paths = (path for path in _files_below(root) if path.suffix == ".py")
        return f"standard library of Python {version}", [Source(path, False) for path in paths]
    found = [source for item in data for source in _matches(item)]
    names = [pathlib.Path(item).name or item for item in data]
    return " + ".join(names), list(dict.fromkeys(found))


def read_documents(sources: Iterable[Source], name: str) -> tuple[list[Document], list[str]]:
    """The files that hold text, each content once, and a line for each other one with the reason.

    Args:
      sources: the files.
      name: of all of them, for a message.

    Raises:
      ValueError: a file that the user named is empty, unreadable or no text, or nothing is left.
    """
    documents: dict[str, Document] = {}
    skipped = []
    for source in sources:
        try:
            content = read_text(source.path).encode()
        except ValueError as error:
            if source.named:
                raise
            skipped.append(str(error))
            continue
        digest = hashlib.sha256(content).hexdigest()
        documents.setdefault(digest, Document(source.path, len(content), digest))
    if not documents:
        why = f": {'; '.join(skipped[:3])}" if skipped else ""
        raise ValueError(
            f"data={name!r} holds no text, {len(skipped)} files were passed over{why}; give files "
            "of UTF-8 text"
        )
    return list(documents.values()), skipped


def split_documents(
    documents: Sequence[Document], validation_fraction: float
) -> tuple[list[Document], list[Document]]:
    """The documents to train on and those to validate on, each in the order given.

    Files are drawn for validation in the order of their digests, while they fit into its share of
    the bytes; of two files or more, each side has one at least.
    """
    room = validation_fraction * sum(document.size for document in documents)
    drawn = set()
    for document in sorted(documents, key=lambda document: document.digest):
        if document.size <= room:
            drawn.add(document.digest)
            room -= document.size
    if not drawn and len(documents) > 1:
        drawn = {min(documents, key=lambda document: (document.size, document.digest)).digest}
    train = [document for document in documents if document.digest not in drawn]
    return train, [document for document in documents if document.digest in drawn]


def read_text(path: pathlib.Path) -> str:
    """The text in a file, its line ends as they are.

    Raises:
      ValueError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"data={str(path)!r} is a pipe or a device; give a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"data={str(path)!r} cannot be read ({error.strerror}); mend its permissions or leave "
            "it out"
        ) from None
    if not content:
        raise ValueError(f"data={str(path)!r} is empty; give a file with text")
    if b"\0" in content:
        raise ValueError(f"data={str(path)!r} is binary (it has NUL bytes); give UTF-8 text")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data={str(path)!r} is not UTF-8 text (byte {error.start} is "
            f"0x{content[error.start]:02x}); convert it to UTF-8"
        ) from None


def _matches(item: str) -> list[Source]:
    path = pathlib.Path(item).expanduser()
    if path.is_dir():
        return [Source(inside, False) for inside in _files_below(path)]
    if path.exists():
        return [Source(path, True)]
    matches = [pathlib.Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not matches:
        raise FileNotFoundError(
            f"data={item!r} is no file, directory or pattern that matches one; check the path "
            f"(relative to {os.getcwd()})"
        )
    inside = [_files_below(match) if match.is_dir() else [match] for match in matches]
    return [Source(path, False) for paths in inside for path in paths]


def _files_below(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _NOT_STANDARD and f[0] != ".")
        for name in sorted(files):
            if name[0] != ".":
                yield pathlib.Path(folder, name)
