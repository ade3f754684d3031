"""The words a PE receives, read off each kernel's trace, equal the formula of its docstring."""

import pytest

from benchmarks import traffic

CASES = traffic.cases()


@pytest.mark.parametrize("p", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("name", CASES)
def test_a_program_sends_what_its_docstring_says(name, p):
    case = CASES[name]
    assert traffic.read(case, p) == (case.words(p), case.steps(p))
