"""Pages: prefixes are found again, the oldest are evicted, and the books always balance."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from serving.pages import PagePool


def taken(pool, count):
    pages = pool.allocate(count)
    assert pages is not None
    return pages


def text(*numbers):
    return np.array(numbers, np.int32)


def test_a_prefix_is_found_by_its_tokens_and_what_precedes_them():
    pool = PagePool(4, 2)
    hashes = pool.hashes(text(1, 2, 3, 4, 5))
    assert len(hashes) == 2
    pages = taken(pool, 2)
    for page, hashed in zip(pages, hashes, strict=True):
        pool.keep(page, hashed)
    pool.release(pages)
    assert pool.match(pool.hashes(text(1, 2, 3, 4))) == pages
    assert pool.match(pool.hashes(text(3, 4, 1, 2))) == []
    assert pool.kinds == "hh.."
    pool.check([pages])
    pool.release(pages)
    assert pool.kinds == "ee.."
    pool.forget()
    assert pool.kinds == "...."


def test_the_least_recently_used_page_goes_first_and_a_text_loses_its_end_first():
    pool = PagePool(3, 1)
    first, second = pool.hashes(text(1, 2)), pool.hashes(text(7))
    for hashes in (first, second):
        pages = taken(pool, len(hashes))
        for page, hashed in zip(pages, hashes, strict=True):
            pool.keep(page, hashed)
        pool.release(pages)
    held = pool.allocate(1)
    assert len(pool.match(first)) == 1 and len(pool.match(second)) == 1
    assert held is not None and pool.allocate(1) is None


@hypothesis.given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=30))
def test_the_books_balance_whatever_comes(requests):
    pool = PagePool(6, 2)
    held: list[list[int]] = []
    for prefix, length in requests:
        tokens = text(*range(10 * prefix, 10 * prefix + length))
        hashes = pool.hashes(tokens)
        pages = pool.match(hashes)
        new = pool.allocate(-(-length // 2) - len(pages))
        if new is None:
            pool.release(pages)
            if held:
                pool.release(held.pop(0))
        else:
            pages += new
            for page, hashed in zip(pages, hashes, strict=False):
                pool.keep(page, hashed)
            held.append(pages)
        pool.check(held)
        assert pool.free + pool.evictable + pool.held == 6


def test_restored_pages_are_evictable_in_their_order():
    pool, again = PagePool(4, 1), PagePool(3, 1)
    for tokens in ((1, 2), (7,)):
        pages = taken(pool, len(tokens))
        for page, hashed in zip(pages, pool.hashes(text(*tokens)), strict=True):
            pool.keep(page, hashed)
        pool.release(pages)
    listed = [hashed for _, hashed in pool.list_evictable()]
    assert listed == [*reversed(pool.hashes(text(1, 2))), *pool.hashes(text(7))]
    again.restore(listed)
    assert [hashed for _, hashed in again.list_evictable()] == listed
    again.check([])
    assert len(again.match(pool.hashes(text(1, 2)))) == 2
