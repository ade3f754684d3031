"""Read JSON that may be damaged or hostile: bounded time and memory, errors that name the file."""

import collections
import json
import os
import pathlib
import stat
from typing import Any

# An object or list of JSON takes some 60 bytes of memory for 3 of text. The largest vocabulary has
# half a million.
_MOST_CONTAINERS = 1_000_000
_DEEPEST = 64  # the deepest of these files, a tokenizer.json, has 8
_LONGEST_NUMBER = 1000  # digits
_SHOWN = 80  # characters of a value in a message


def read_json(file: str | os.PathLike[str], most: int = 100_000_000) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Args:
      file: a regular file, or a link to one, in UTF-8.
      most: the most bytes it may have.

    Raises:
      ValueError: it is not a regular file, is too large, is not JSON or not an object, or an object
        in it has the same name twice.
      OSError: there is no such file, or it cannot be read.
    """
    path = pathlib.Path(file)
    size = file_size(path)
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that it may have")
    return parse_json(path.read_bytes(), str(path))


def is_there(file: str | os.PathLike[str]) -> bool:
    """Whether a file stands in its folder, or a link that leads nowhere, as in half a download.

    Such a link is no file that is missing: to read it is an error that names it.
    """
    return os.path.lexists(file)


def file_size(file: str | os.PathLike[str]) -> int:
    """The bytes of a regular file. Ask before opening: opening a FIFO waits for a writer.

    Raises:
      ValueError: it is not a regular file, nor a link to one.
      OSError: there is no such file, or no link either.
    """
    try:
        status = os.stat(file)
    except FileNotFoundError:
        if not os.path.islink(file):
            raise
        raise ValueError(
            f"{os.fspath(file)} is a link to {os.readlink(file)!r}, which is not there; fetch the "
            "checkpoint again"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        kinds = {
            stat.S_IFDIR: "a folder",
            stat.S_IFIFO: "a FIFO",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device",
            stat.S_IFBLK: "a device",
        }
        kind = kinds.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"{os.fspath(file)} is {kind}, not a regular file")
    if (real := os.path.realpath(file)).startswith("/proc/"):  # to read one may wait for ever
        raise ValueError(f"{os.fspath(file)} is a link to {real}, which the system makes")
    return status.st_size


def refuse_pointer(first: bytes, what: str) -> None:
    """Raises ValueError if a file, which begins with `first`, is what Git LFS puts in its place."""
    if first.startswith(b"version https://git-lfs"):
        raise ValueError(f"{what} is a pointer of Git LFS; fetch the file with `git lfs pull`")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `text` spells.

    Args:
      text: the object in UTF-8, with or without a byte order mark.
      what: the file, for messages.

    Raises:
      ValueError: it is not JSON or not an object, has too many parts or too deep ones, or an object
        in it has the same name twice.
    """
    refuse_pointer(text, what)
    containers = text.count(b"{") + text.count(b"[")
    if containers > _MOST_CONTAINERS:
        raise ValueError(f"{what} has {containers:,} brackets, more than {_MOST_CONTAINERS:,}")
    try:
        value = json.loads(
            text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_int=_parse_number
        )
        deep = _is_deep(value)
    except RecursionError:
        deep = True
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None
    if deep:
        raise ValueError(f"{what} is not valid JSON: brackets stand in more than {_DEEPEST} others")
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object, it is {shown(value)}")
    return value


def shown(value: Any) -> str:
    """`value` for a message: what a file holds may be as long as the file."""
    if isinstance(value, dict | list) and len(value) > _SHOWN:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits, or something with one"
    except RecursionError:
        return "something that is nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _parse_number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:  # Python would need the square of its length in time
        raise ValueError(f"a number has {len(digits):,} digits, more than {_LONGEST_NUMBER:,}")
    return int(digits)


def _is_deep(value: Any) -> bool:
    """Whether brackets stand in more than `_DEEPEST` others; looks at one depth after another."""
    level: list[Any] = [[value]]
    for _ in range(_DEEPEST + 1):
        level = [
            part
            for whole in level
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} stands in it twice")
    return fields
