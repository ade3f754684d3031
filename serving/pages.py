"""Which pages of the cache are free, which are in use, and which hold a prefix to be used again.

W. Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
2023. A full page is known by a hash of its tokens and of the page before it, so that equal prefixes
have equal hashes.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

HASH_BYTES = 16


class PagePool:
    """Pages by number, counted by reference.

    A page is held (a request uses it), evictable (nobody uses it, but its tokens may come again) or
    free. `free + evictable + held` is the number of pages, always.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        self.pages = pages
        self.page_tokens = page_tokens
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._evictable: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._kinds = bytearray(b"." * pages)

    @property
    def free(self) -> int:
        """Pages without a token."""
        return len(self._free)

    @property
    def evictable(self) -> int:
        """Pages that nobody uses, with tokens that may come again."""
        return len(self._evictable)

    @property
    def held(self) -> int:
        """Pages in use."""
        return self.pages - self.free - self.evictable

    @property
    def kinds(self) -> str:
        """What each page is, by number: `h` held, `e` evictable, `.` free."""
        return self._kinds.decode()

    def hashes(self, tokens: np.ndarray, known: Sequence[bytes] = ()) -> list[bytes]:
        """The hash of each full page of a text.

        Args:
          tokens: of the text, int32.
          known: the hashes of its first pages, which are not computed again.
        """
        hashes = list(known)
        for page in range(len(hashes), len(tokens) // self.page_tokens):
            begin = page * self.page_tokens
            chained = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=HASH_BYTES)
            chained.update(tokens[begin : begin + self.page_tokens].astype(np.int32).tobytes())
            hashes.append(chained.digest())
        return hashes

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known prefix; the caller holds them from now on."""
        pages = []
        for one in hashes:
            page = self._page_of.get(one)
            if page is None:
                break
            self._evictable.pop(page, None)
            self._references[page] += 1
            self._kinds[page] = ord("h")
            pages.append(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages for the caller to hold; None, and nothing changes, if there are too few.

        Free pages are taken first, then those that nobody has used for longest.
        """
        if count > self.free + self.evictable:
            return None
        while len(self._free) < count:
            page, _ = self._evictable.popitem(last=False)
            del self._page_of[self._hash_of.pop(page)]
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self._kinds[page] = ord("h")
        return pages

    def keep(self, page: int, hashed: bytes) -> None:
        """Makes a full page known by its hash; a page that another one equals stays unknown."""
        if hashed not in self._page_of and page not in self._hash_of:
            self._page_of[hashed] = page
            self._hash_of[page] = hashed

    def release(self, pages: Sequence[int]) -> None:
        """Gives up pages of one request, in the order of its text."""
        # The last page is evicted first: without the pages before it, it is of no use.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._hash_of:
                self._evictable[page] = None
                self._kinds[page] = ord("e")
            else:
                self._free.append(page)
                self._kinds[page] = ord(".")

    def list_evictable(self) -> list[tuple[int, bytes]]:
        """The evictable pages with their hashes, the one that goes first at the beginning."""
        return [(page, self._hash_of[page]) for page in self._evictable]

    def restore(self, hashes: Sequence[bytes]) -> list[int]:
        """Pages that are evictable from now on, in the order of `list_evictable`.

        Args:
          hashes: of each; the pool has as many pages to give, and knows none of these.
        """
        pages = self.allocate(len(hashes))
        assert pages is not None
        for page, hashed in zip(pages, hashes, strict=True):
            self.keep(page, hashed)
            self.release([page])
        return pages

    def forget(self) -> None:
        """Frees every evictable page."""
        for page in self._evictable:
            del self._page_of[self._hash_of.pop(page)]
            self._free.append(page)
            self._kinds[page] = ord(".")
        self._evictable.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless the books agree with the pages that requests hold.

        Args:
          held: the pages of each request.
        """
        counts = collections.Counter(page for pages in held for page in pages)
        references = {page: n for page, n in enumerate(self._references) if n}
        if references != dict(counts):
            raise AssertionError(f"pages: references are {references}, requests hold {counts}")
        kinds = [set(self._free), set(self._evictable), set(references)]
        if sum(map(len, kinds)) != self.pages or len(set().union(*kinds)) != self.pages:
            raise AssertionError(
                f"pages: {self.free} free + {self.evictable} evictable + {len(references)} held "
                f"are not {self.pages}"
            )
        if [{p for p, kind in enumerate(self.kinds) if kind == k} for k in ".eh"] != kinds:
            raise AssertionError(f"pages: {self.kinds} does not say what they are")
        if self._page_of != {hashed: page for page, hashed in self._hash_of.items()}:
            raise AssertionError("pages: hashes and pages do not match")
