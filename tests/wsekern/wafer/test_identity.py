import dataclasses
import functools
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from wsekern.wafer.program import freeze, program_key


def plus(u, by):
    return u + by


def holding(value):
    return lambda u: plus(u, value)


@dataclasses.dataclass(frozen=True)
class Rule:
    scale: float
    parts: tuple


SAME = [
    (holding(1), holding(1)),
    (holding((1, "a")), holding((1, "a"))),
    (holding(Rule(1.0, (1, 2))), holding(Rule(1.0, (1, 2)))),
    (functools.partial(plus, by=1), functools.partial(plus, by=1)),
    (functools.partial(holding(1)), functools.partial(holding(1))),
    (holding(plus), holding(plus)),
]
OTHER = [
    (holding(1), holding(1.0)),
    (holding(1), holding(True)),
    (holding((1,)), holding((1.0,))),
    (holding(0.0), holding(-0.0)),
    (holding(np.float32(1)), holding(np.float64(1))),
    (holding(Rule(1.0, (1,))), holding(Rule(1.0, (1.0,)))),
    (holding(holding(1)), holding(holding(2))),
    (functools.partial(plus, by=1), functools.partial(plus, 1)),
    (lambda u: u, lambda u: u + 1),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_made_afresh_it_is_the_same_program(a, b):
    assert program_key(a) == program_key(b) and hash(program_key(a)) == hash(program_key(b))


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_what_differs_in_what_it_holds_is_another(a, b):
    assert program_key(a) != program_key(b)


def test_code_that_is_loaded_anew_is_another_program():
    source = "lambda u: helper(u)"
    assert program_key(eval(source)) != program_key(eval(source))


def calls_itself():
    def kernel(u, times=2):
        return kernel(u + 1, times - 1) if times else u

    return kernel


def held_before_it_is_there():
    def kernel(u):
        return later(u)

    found = program_key(kernel)

    def later(u):
        return u

    return found


def test_what_cannot_be_told_has_no_key():
    assert program_key(holding([1])) is None
    assert program_key(holding(np.zeros(2))) is None
    assert (
        program_key(holding(jnp.zeros(2))) is None
    )  # a program that is kept would keep it in memory
    assert program_key(calls_itself()) is None
    assert held_before_it_is_there() is None


def test_frozen_keeps_what_is_held_now():
    by = 1

    def inner(u):
        return u + by

    kernel = functools.partial(lambda u, times: inner(u) * times, times=10)
    kept = freeze(kernel)
    by = 2
    assert (kept(0), kernel(0)) == (10, 20)
    assert program_key(kept) != program_key(kernel)


def test_frozen_keeps_defaults_and_its_name():
    by = 1

    def kernel(u, a=3, *, b=4):
        return u + by + a + b

    kept = freeze(kernel)
    assert kept(0) == 8 and kept.__name__ == "kernel"


def test_in_a_script_a_helper_defined_anew_is_another_program():
    script = (
        "from wsekern.wafer.program import program_key\n"
        "def make(): return lambda u: helper(u)\n"
        "def helper(u): return u + 1\n"
        "first = program_key(make())\n"
        "assert first == program_key(make())\n"
        "def helper(u): return u + 2\n"
        "assert first != program_key(make())\n"
        "def helper(u): return helper(u - 1) if u else 0\n"
        "assert program_key(make()) == program_key(make()) is not None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
