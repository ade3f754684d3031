import types

import pytest

from wsekern.compiler.search import largest_that_fits


def compiler(limit):
    def compile_at(size):
        return types.SimpleNamespace(fits=size <= limit, size=size)

    return compile_at


@pytest.mark.parametrize("limit", [1, 2, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize("start", [1, 16, 200])
def test_the_largest_size_that_fits_is_found(limit, start):
    size, tried = largest_that_fits(compiler(limit), start)
    assert size is not None and size == limit and len(tried) < 24
    assert tried[size].fits and not tried[size + 1].fits


def test_sizes_are_multiples_of_the_unit():
    size, tried = largest_that_fits(compiler(30), 8, unit=4)
    assert size == 28 and all(one % 4 == 0 for one in tried)


def test_none_may_fit():
    size, tried = largest_that_fits(compiler(0), 16)
    assert size is None and min(tried) == 1


def test_a_start_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="the size 6 must be a positive multiple of 4"):
        largest_that_fits(compiler(9), 6, unit=4)
