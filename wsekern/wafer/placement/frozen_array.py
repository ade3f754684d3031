"""This file is an array that is a value: it does not change, and equals another by content."""

from __future__ import annotations

import hashlib

import numpy as np


class Held:
    """A read-only array, hashed once by what it holds."""

    __slots__ = ("_digest", "array")

    def __init__(self, array: np.ndarray):
        self.array = np.array(array, order="C")  # a copy: nobody else can write to it
        self.array.flags.writeable = False
        told = f"{self.array.dtype}{self.array.shape}".encode()
        self._digest = hashlib.blake2b(told + self.array.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)
