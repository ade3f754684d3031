"""The example kernel: equal to the whole plate, and to docs/own_kernel.md."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import own_kernel
from examples.own_kernel import heat, plain, spread

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "own_kernel.md"
PLATE = np.random.default_rng(0).random((8, 16), np.float32)


@pytest.mark.parametrize("steps", [0, 1, 10])
def test_equals_the_whole_plate(wafer, steps):
    run = jax.jit(functools.partial(spread, wafer=wafer, steps=steps))
    np.testing.assert_allclose(run(PLATE), plain(jnp.array(PLATE), steps), atol=1e-6)


def test_its_gradient_equals_that_of_the_whole_plate(full_wafer):
    def energy(u, run):
        return jnp.sum(run(u) ** 3)

    gradient = jax.jit(jax.grad(energy), static_argnums=1)
    got = gradient(PLATE, functools.partial(spread, wafer=full_wafer))
    np.testing.assert_allclose(got, gradient(PLATE, plain), atol=1e-6)


def test_the_page_shows_this_kernel():
    assert inspect.getsource(heat) in PAGE.read_text()


def test_the_program_runs(capsys):
    own_kernel.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("as in plain jnp [True, True]") for line in lines)
