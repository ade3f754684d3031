"""Output files: refused before anything is computed for them, and written whole or not at all."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Collection

from wsekern.atomic_write import atomic_write

Path = str | pathlib.Path


def check_writable(path: Path, suffixes: Collection[str] = ()) -> None:
    """Returns if a file can be written at `path`; leaves nothing there.

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
    _check_room(path, target.parent)


def check_new_folder(path: Path) -> None:
    """Returns if `path` is an empty folder or can be made one; leaves nothing there.

    Raises:
      OSError: it is no folder, or its parent is none or may not be written in.
      ValueError: something is in it already.
    """
    folder = pathlib.Path(path).resolve()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise OSError(f"cannot write to {str(path)!r}: {str(there)!r} is no folder")
    if there == folder and any(folder.iterdir()):
        raise ValueError(f"{str(path)!r} holds something already; name another folder")
    _check_room(path, there)


def _check_room(path: Path, folder: pathlib.Path) -> None:
    # Rights alone do not tell: the file system may be read-only, or allow no file here.
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"cannot write {str(path)!r}: no file can be made in {str(folder)!r} ({error.strerror})"
        ) from None


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
