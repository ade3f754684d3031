"""Output files: refused before anything is computed for them, and written whole or not at all."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Collection

from wsekern.atomic_write import atomic_write

Path = str | pathlib.Path


def check_writable(path: Path, suffixes: Collection[str] = ()) -> None:
    """Returns if a file can be written at `path`; writes nothing.

    Args:
      path: of the file.
      suffixes: the endings that it may have, as ".png"; empty: any.

    Raises:
      OSError: its folder is missing or read-only, or there is something else than a file.
      ValueError: it has another ending.
    """
    if suffixes and pathlib.Path(path).suffix.lower() not in suffixes:
        raise ValueError(f"{str(path)!r} must end in {' or '.join(suffixes)}")
    target = pathlib.Path(path).resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is there, and no regular file")
    if not target.parent.is_dir():
        raise OSError(f"cannot write {str(path)!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OSError(f"cannot write {str(path)!r}: the folder may not be written in")


def write(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: beside `path` first, then renamed.

    Args:
      path: of the file; a symbolic link stays one, and its target is replaced.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written.
    """
    check_writable(path)
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
