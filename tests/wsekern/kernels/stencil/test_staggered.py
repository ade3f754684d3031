"""Fields of two grids, half a cell apart: cells and the faces between them."""

import functools

import jax
import numpy as np
import pytest

import wsekern as wk

INSIDE = (slice(1, -1),) * 2


def gravity_waves(state):
    """On an Arakawa C grid: `u` is on each cell's face to the east, `v` on that to the south."""
    h, u, v = state["h"], state["u"], state["v"]
    outflow = u[1:-1, 1:-1] - u[1:-1, :-2] + v[1:-1, 1:-1] - v[:-2, 1:-1]
    return {
        "h": h[INSIDE] - 0.125 * outflow,
        "u": u[INSIDE] - 0.125 * (h[1:-1, 2:] - h[INSIDE]),
        "v": v[INSIDE] - 0.125 * (h[2:, 1:-1] - h[INSIDE]),
    }


def with_all_faces(h, steps):
    """The same in numpy, with one face more than there are cells in each dimension."""
    rows, columns = h.shape
    u, v = np.zeros((rows, columns + 1), h.dtype), np.zeros((rows + 1, columns), h.dtype)
    for _ in range(steps):
        outflow = np.diff(u, axis=1) + np.diff(v, axis=0)
        u[:, 1:-1] -= 0.125 * np.diff(h, axis=1)
        v[1:-1] -= 0.125 * np.diff(h, axis=0)
        h = h - 0.125 * outflow
    return {"h": h, "u": u[:, 1:], "v": v[1:]}


def test_between_walls(full_wafer):
    """The face before the first cell is a ghost; the one after the last cell stays as it is."""
    h = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    state = {"h": h, "u": np.zeros_like(h), "v": np.zeros_like(h)}
    walls = {"h": "edge", "u": ["edge", ("zero", "fixed")], "v": [("zero", "fixed"), "edge"]}
    go = functools.partial(wk.stencil, update=gravity_waves, radius=1, boundary=walls, steps=12)
    got = jax.jit(functools.partial(go, wafer=full_wafer))(state)
    for name, want in with_all_faces(h, 12).items():
        np.testing.assert_allclose(got[name], want, atol=1e-5)
    assert abs(np.asarray(got["h"], np.float64).sum() - h.sum(dtype=np.float64)) < 1e-4


@pytest.mark.refuses
@pytest.mark.parametrize(
    ("faces", "message"),
    [
        ((16, 17), "along dimension 1 some have one face more than there are cells"),
        ((17, 17), "dimension 0, 1 some have one face more .* leave the first face out"),
        ((16, 18), "they must be alike: call it for each shape"),
        ((16,), "they must be alike: call it for each shape"),
    ],
)
def test_refuses_fields_of_two_sizes(faces, message):
    state = {"h": np.zeros((16, 16), np.float32), "u": np.zeros(faces, np.float32)}
    with pytest.raises(ValueError, match=message):
        wk.stencil(state, gravity_waves, radius=1)
