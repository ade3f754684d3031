"""Write a file whole or not at all: under another name first, then renamed into its place."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import BinaryIO

_partial: set[pathlib.Path] = set()  # files that `atomic_write` has not put into place yet


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write to; when the `with` block ends, it takes the place of `path`.

    If the block raises or the disk is full, `path` stays as it was, and nothing is left beside it.

        with atomic_write("run/config.json") as file:
            file.write(text.encode())

    Args:
      path: the file to write; a symbolic link stays a link, and its target is written.

    Raises:
      OSError: the folder is missing or not writable, or the disk is full; it names the file.
    """
    target = pathlib.Path(path).resolve()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    _partial.add(partial)
    try:
        with partial.open("xb") as file:
            yield file
            # On disk before the rename: a power cut leaves the old content or the new, never half.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        error.filename = error.filename or str(target)  # a write that fails names no file
        raise
    finally:
        partial.unlink(missing_ok=True)
        _partial.discard(partial)


def remove_partial_files() -> None:
    """Removes the files that are being written; for a process that ends at once."""
    for partial in tuple(_partial):
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
