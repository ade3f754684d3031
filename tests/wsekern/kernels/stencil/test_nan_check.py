"""`check_finite` names the field, the step and the cell of the first NaN or infinity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wsekern as wk

INSIDE = (slice(1, -1),) * 2


def spoil(state, step):
    """Keeps both fields, but makes every 2 in `h` infinite at the seventh step."""
    h = state["h"][INSIDE]
    return {"a": state["a"][INSIDE], "h": jnp.where((h == 2) & (step == 6), jnp.inf, h)}


@pytest.mark.parametrize("name", ["2x4", "virtual-4x4"])
def test_finds_field_step_and_cell(name, wafer_called):
    u = np.ones((15, 14), np.float32)
    u[11, 13] = 2
    state = {"a": np.ones_like(u), "h": u}
    options = {"radius": 1, "boundary": "edge", "check_finite": True, "wafer": wafer_called(name)}
    with pytest.raises(FloatingPointError, match=r"'h' .* cell \(11, 13\) after step 7 of 10"):
        wk.stencil(state, spoil, steps=10, **options)


def test_finds_operands_that_are_not_finite():
    u = np.ones((6, 5), np.float32)
    go = functools.partial(wk.stencil, radius=1, steps=2, check_finite=True)
    spread = lambda v: v[1:-1, 1:-1] + v[:-2, 1:-1]  # noqa: E731
    np.testing.assert_array_equal(go(u, spread)[2:], 4 * u[2:])
    u[3, 4] = np.nan
    with pytest.raises(FloatingPointError, match=r"field 0 .* cell \(3, 4\) before the first step"):
        go(u, spread)


@pytest.mark.refuses
def test_refuses():
    u = np.ones((6, 5), np.float32)
    with pytest.raises(ValueError, match="needs the values of u, which is traced"):
        jax.jit(lambda u: wk.stencil(u, lambda v: v, radius=0, check_finite=True))(u)
    with pytest.raises(ValueError, match="donate=True gives it away; choose one"):
        wk.stencil(u, lambda v: v, radius=0, check_finite=True, donate=True)
