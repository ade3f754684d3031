"""The text to train on: which files, read one at a time, and whether for training or validation.

A whole file belongs either to the training data or to the validation data, and files with equal
content count once, so that no text is in both.
"""

import dataclasses
import fnmatch
import glob
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

# Installed packages and caches, which differ from machine to machine.
_NOT_STANDARD = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, order=True)
class Source:
    """A file that may hold text."""

    path: pathlib.Path
    named: bool  # by the user: then it must be text; files found in folders may be skipped

    def stamp(self) -> tuple[str, int, int, int, int]:
        """Path, size in bytes, times of change in ns, inode: they differ if the file has changed.

        A file that replaces another may have its size and its time of writing.
        """
        try:
            status = self.path.stat()
        except OSError:  # such as a broken link; reading it will raise
            return str(self.path), -1, -1, -1, -1
        times = status.st_mtime_ns, status.st_ctime_ns
        return str(self.path.absolute()), status.st_size, *times, status.st_ino


@dataclasses.dataclass(frozen=True)
class Document:
    """A file that holds text."""

    path: pathlib.Path
    size: int  # bytes
    digest: str  # SHA-256 of its content


def find_sources(data: Sequence[str]) -> tuple[str, list[Source]]:
    """The name of the data for people, and its files in a fixed order.

    Args:
      data: files, directories (all files in them, hidden ones left out) and glob patterns; if
        empty, the Python sources of the interpreter's standard library.

    Raises:
      FileNotFoundError: one of `data` is not there, or matches nothing.
    """
    if not data:
        version = sysconfig.get_python_version()
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        paths = (path for path in _files_below(root) if path.suffix == ".py")
        return f"standard library of Python {version}", [Source(path, False) for path in paths]
    sources = [source for item in data for source in _matches(item)]
    names = [pathlib.Path(item).name or item for item in data]
    return " + ".join(names), list(dict.fromkeys(sources))


def read_documents(sources: Iterable[Source], name: str) -> tuple[list[Document], list[str]]:
    """The files that hold text, each content once, and a line with the reason for each other file.

    Args:
      sources: the files.
      name: the name of the data, for the error message.

    Raises:
      ValueError: a file that the user named is empty, unreadable or not text, or no file is left.
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
    """The documents for training and for validation, each in the order given.

    Files go to validation in the order of their digests, which is as good as random and does not
    change with other files, as long as they fit into its share of the bytes. Of two files or more,
    each part gets at least one.
    """
    room = validation_fraction * sum(document.size for document in documents)
    chosen = set()
    for document in sorted(documents, key=lambda document: document.digest):
        if document.size <= room:
            chosen.add(document.digest)
            room -= document.size
    if not chosen and len(documents) > 1:
        chosen = {min(documents, key=lambda document: (document.size, document.digest)).digest}
    train = [document for document in documents if document.digest not in chosen]
    return train, [document for document in documents if document.digest in chosen]


def read_text(path: pathlib.Path) -> str:
    """The text in a file, with its line ends unchanged.

    Raises:
      ValueError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    if path.is_dir():
        raise ValueError(
            f"data={str(path)!r} is a folder that cannot be read; mend its permissions"
        )
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"data={str(path)!r} cannot be read: it is a link to {os.readlink(path)!r}, which "
            "leads to no file; mend the link or leave it out"
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"data={str(path)!r} is a pipe or a device; give a file")
    try:
        content = path.read_bytes()
    except OSError as error:
        mend = "mend its permissions or " if isinstance(error, PermissionError) else ""
        raise ValueError(
            f"data={str(path)!r} cannot be read ({error.strerror}); {mend}leave it out"
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
    path = pathlib.Path(os.path.expanduser(item))  # of an unknown user it stays as it is
    if path.is_dir():
        return [Source(inside, False) for inside in _files_below(path)]
    if path.exists() or path.is_symlink():
        return [Source(path, True)]
    matches = _expand(path)
    if not matches:
        raise FileNotFoundError(
            f"data={item!r} is no file, directory or pattern that matches one; check the path "
            f"(relative to {os.getcwd()})"
        )
    inside = [_files_below(match) if match.is_dir() else [match] for match in matches]
    return [Source(path, False) for paths in inside for path in paths]


def _expand(pattern: pathlib.Path) -> list[pathlib.Path]:
    """What matches a pattern, in order, as by `glob.glob`, but a `**` enters no folder twice.

    With a link to the folder that it stands in, `glob.glob` finds the same files under more names
    than can be counted.
    """
    first, *parts = pattern.parts if pattern.anchor else ("", *pattern.parts)
    found = [pathlib.Path(first)]
    named = True  # by the user, part for part
    for part in parts[:-1]:
        found = list(_folders_below(found, named) if part == "**" else _folders(found, part))
        named &= not glob.has_magic(part)
    last = parts[-1] if parts else "."
    if last == "**":  # folders too, but `_matches` would find their files a second time
        found = list(_folders_below(found, named))
        files = [folder / name for folder in found for name in _names(folder)]
        return [file for file in files if not file.is_dir()]
    return [folder / name for folder in found for name in _names_matching(folder, last)]


def _folders(within: Iterable[pathlib.Path], part: str) -> Iterator[pathlib.Path]:
    for folder in within:
        for name in _names_matching(folder, part):
            if (folder / name).is_dir():
                yield folder / name


def _folders_below(roots: Iterable[pathlib.Path], named: bool) -> Iterator[pathlib.Path]:
    """`roots` and all folders in them, links included, each real folder once.

    A link up the tree is entered only if it is a root and the user has `named` it: the folders that
    it leads to are more than those asked for, perhaps the whole disk.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [(root, named) for root in reversed(list(roots))]
    while waiting:
        folder, named = waiting.pop()
        try:
            status = folder.stat()
        except OSError:  # such as a link that leads nowhere
            continue
        above = folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
        if (status.st_dev, status.st_ino) in seen or (above and not named):
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder
        inside = [folder / name for name in _names(folder)]
        waiting += [(path, False) for path in reversed(inside) if path.is_dir()]


def _names_matching(folder: pathlib.Path, part: str) -> list[str]:
    if not glob.has_magic(part):
        return [part] if os.path.lexists(folder / part) else []
    return fnmatch.filter(_names(folder, hidden=part[0] == "."), part)


def _names(folder: pathlib.Path, hidden: bool = False) -> list[str]:
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # not a folder, or not readable
        return []
    return [name for name in names if hidden or name[0] != "."]


def _files_below(root: pathlib.Path) -> Iterator[pathlib.Path]:
    unreadable: list[pathlib.Path] = []
    walk = os.walk(root, onerror=lambda error: unreadable.append(pathlib.Path(error.filename)))
    for folder, folders, files in walk:
        folders[:] = sorted(f for f in folders if f not in _NOT_STANDARD and f[0] != ".")
        for name in sorted(files):
            if name[0] != ".":
                yield pathlib.Path(folder, name)
    yield from unreadable  # `read_text` names them
