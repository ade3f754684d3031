"""Give the memory of a mapped file back to the system."""

import mmap
from collections.abc import Iterable

import numpy as np


def forget_pages(maps: Iterable[np.ndarray]) -> None:
    """Drops the pages of files mapped by `np.memmap`, which count as the process's memory.

    The arrays stay valid: a page is read again when it is needed. Does nothing where the system
    cannot.

    Args:
      maps: arrays that map whole files, read-only.
    """
    for array in maps:
        mapped = array.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)
