"""A read-only NumPy array, hashed and compared by content."""

import hashlib

import numpy as np


class FrozenArray:
    """A copy of an array that nobody can write to, so that it can be part of a cache's key."""

    __slots__ = ("_digest", "array")

    def __init__(self, array: np.ndarray) -> None:
        self.array = np.array(array, order="C")
        self.array.flags.writeable = False
        # Hashed once: a map of 970,000 PEs is looked up at every call of a program.
        header = f"{self.array.dtype}{self.array.shape}".encode()
        self._digest = hashlib.blake2b(header + self.array.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FrozenArray) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)
