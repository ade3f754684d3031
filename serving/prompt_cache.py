"""Keep the pages of prompts in a file, so that their prefixes are found again after a restart.

The file is in the format of safetensors. Its metadata has a key of the model and of all else that
the numbers in a page depend on; a file of another key is left alone. Its tensors:

    hashes  uint8 [P, 16]  of each page's tokens and all before them, least recently used first
    pages   uint8 [P, N]   keys and values of all layers
    checks  uint32 [P]     CRC-32 of the page's hash and bytes
"""

import dataclasses
import hashlib
import json
import pathlib
import time
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from serving.api.logs import log
from serving.pages import HASH_BYTES, PagePool
from serving.programs import Programs
from wsekern.atomic_write import atomic_write
from wsekern.error_line import error_line

_FORMAT = "wsekern prompt cache 1"
_MOST_HEADER = 10_000  # bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCache:
    """Where an engine keeps its pages between its end and its next start.

    Nothing here ever fails an engine: what cannot be read or written is logged, and ignored.

    Args:
      file: of one model.
      most_bytes: size of the file, at most; the pages that were used last are kept.
      made_by: what must be equal besides the model: a hash of the tokenizer.
    """

    file: pathlib.Path
    most_bytes: int
    made_by: str = ""

    def restore(self, programs: Programs, pool: PagePool) -> None:
        """Reads pages into the cache of an engine without a request; they are evictable."""
        start = time.monotonic()
        try:
            hashes, pages = read_pages(self.file, self._key(programs))
        except FileNotFoundError:
            return
        except (ValueError, OSError) as error:
            log("prompt cache ignored", file=self.file, reason=error_line(error))
            return
        kept = slice(max(0, len(hashes) - pool.pages), None)
        parts = programs.pages_of(0)  # of the same shapes and dtypes
        ends = np.cumsum([part.nbytes for part in parts])
        if len(hashes) and ends[-1] != pages.shape[1]:
            log("prompt cache ignored", file=self.file, reason="its pages are of another size")
            return
        for page, row in zip(pool.restore(hashes[kept]), pages[kept], strict=True):
            pieces = np.split(np.array(row), ends[:-1])
            programs.write_page(
                page,
                [
                    piece.view(part.dtype).reshape(part.shape)
                    for piece, part in zip(pieces, parts, strict=True)
                ],
            )
        seconds = round(time.monotonic() - start, 3)
        log("prompt cache read", file=self.file, pages=len(hashes[kept]), seconds=seconds)

    def save(self, programs: Programs, pool: PagePool) -> None:
        """Writes the evictable pages; with none, the file stays as it is."""
        start = time.monotonic()
        evictable = pool.list_evictable()
        size = sum(part.nbytes for part in programs.pages_of(0)) + HASH_BYTES + 4
        count = max(0, self.most_bytes - _MOST_HEADER) // size
        evictable = evictable[max(0, len(evictable) - count) :]
        if not evictable or not count:
            return
        pages = (b"".join(x.tobytes() for x in programs.pages_of(page)) for page, _ in evictable)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            hashes = [hashed for _, hashed in evictable]
            write_pages(self.file, self._key(programs), hashes, pages, size - HASH_BYTES - 4)
        except OSError as error:
            log("prompt cache not written", file=self.file, reason=error_line(error))
            return
        seconds = round(time.monotonic() - start, 3)
        log("prompt cache written", file=self.file, pages=len(evictable), seconds=seconds)

    def _key(self, programs: Programs) -> str:
        return hashlib.sha256(f"{programs.page_key} {self.made_by}".encode()).hexdigest()


def write_pages(
    file: pathlib.Path, key: str, hashes: Sequence[bytes], pages: Iterable[bytes], size: int
) -> None:
    """Writes a file of pages, whole or not at all; one page at a time is in memory.

    Args:
      file: to write.
      key: that a reader must know.
      hashes: of each page.
      pages: their bytes, `size` each.
      size: bytes of a page.

    Raises:
      OSError: the disk is full, or the folder is not writable.
    """
    checks = np.zeros(len(hashes), "<u4")
    with atomic_write(file) as out:
        out.write(_header(key, len(hashes), size))
        out.write(b"".join(hashes))
        for index, (hashed, page) in enumerate(zip(hashes, pages, strict=True)):
            checks[index] = zlib.crc32(page, zlib.crc32(hashed))
            out.write(page)
        out.write(checks.tobytes())


def read_pages(file: pathlib.Path, key: str) -> tuple[list[bytes], np.ndarray]:
    """The hashes of a file's pages, and their bytes, uint8 [P, N], which stay on disk until used.

    Args:
      file: from `write_pages`.
      key: that it must have.

    Raises:
      ValueError: it is damaged, cut off, or of another key.
      OSError: it cannot be read.
    """
    if not file.is_file() and file.exists():
        raise ValueError("it is no file")
    with file.open("rb") as begin:
        length = int.from_bytes(begin.read(8), "little")
        text = begin.read(min(length, _MOST_HEADER))
    try:
        fields = json.loads(text)
        metadata, (count, size) = fields["__metadata__"], fields["pages"]["shape"]
        is_known = type(count) is type(size) is int and min(count, size) >= 0
        is_known = is_known and metadata["format"] == _FORMAT
    except (ValueError, LookupError, TypeError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError("it is damaged, or no prompt cache")
    if metadata.get("key") != key:
        raise ValueError("it is of another model, version or machine")
    data = np.memmap(file, np.uint8, "r")
    header = _header(key, count, size)
    if len(data) != len(header) + count * (HASH_BYTES + size + 4):
        raise ValueError("it is cut off")
    if data[: len(header)].tobytes() != header:
        raise ValueError("it is damaged")
    first = len(header) + count * HASH_BYTES
    last = first + count * size
    hashes = data[len(header) : first].reshape(count, HASH_BYTES)
    pages = data[first:last].reshape(count, size)
    checks = np.frombuffer(data[last:].tobytes(), "<u4")
    for hashed, page, check in zip(hashes, pages, checks, strict=True):
        if zlib.crc32(page.data, zlib.crc32(hashed.data)) != check:
            raise ValueError("it is damaged")
    return [hashed.tobytes() for hashed in hashes], pages


def _header(key: str, count: int, size: int) -> bytes:
    """The head of a safetensors file, a multiple of 8 bytes long."""
    first, second = count * HASH_BYTES, count * (HASH_BYTES + size)
    fields = {
        "__metadata__": {"format": _FORMAT, "key": key},
        "hashes": {"dtype": "U8", "shape": [count, HASH_BYTES], "data_offsets": [0, first]},
        "pages": {"dtype": "U8", "shape": [count, size], "data_offsets": [first, second]},
        "checks": {"dtype": "U32", "shape": [count], "data_offsets": [second, second + 4 * count]},
    }
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
