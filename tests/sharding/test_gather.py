"""Weights of a split state, brought to where they compute."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import wsekern as wk
from sharding.gather import gather

module = importlib.import_module("sharding.gather")


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (16, 8)), axes=("in", "out"))
        self.transposed = nnx.Param(jax.random.normal(rngs.params(), (8, 16)), axes=("out", "in"))
        self.odd = nnx.Param(jax.random.normal(rngs.params(), (15, 8)), axes=("in", "out"))
        self.scale = nnx.Param(jnp.ones(8), axes=("feature",))


@pytest.mark.parametrize("grid", [(2, 2, 2), (1, 1, 5), (1, 2, 4), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("by_moves", [True, False])
def test_weights_are_whole_and_gradients_go_home(grid, by_moves, monkeypatch):
    """As on TPUs (by moves) and elsewhere."""
    monkeypatch.setattr(module, "_by_moves", lambda wafer: by_moves and wafer.wafers > 1)
    wafer = wk.Wafer.devices(*grid)
    state: Any = nnx.state(Layer(nnx.Rngs(0)))
    rows = {"weight": 16, "transposed": 16, "odd": 15}
    splits = by_moves and wafer.wafers > 1
    parts = wafer.height * wafer.wafers
    moved = [name for name, count in rows.items() if splits and count % parts == 0]

    @jax.jit
    def call(state):
        def loss(state):
            whole = gather(state, wafer, "bfloat16")
            return sum((leaf**2).sum() for leaf in jax.tree.leaves(whole)), whole

        (_, whole), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        return whole, gradient

    whole, gradient = call(state)
    for name in ("weight", "transposed", "odd", "scale"):
        want, got = state[name].get_value(), whole[name].get_value()
        assert got.dtype == (jnp.bfloat16 if name in moved else jnp.float32)
        np.testing.assert_array_equal(got, want.astype(got.dtype))
        np.testing.assert_allclose(gradient[name].get_value(), 2 * want, rtol=1e-2)
    for name in moved:
        spec = P("x", ("y", "wafer")) if name == "transposed" else P(("y", "wafer"), "x")
        home = wafer.sharding(spec)
        assert gradient[name].get_value().sharding.is_equivalent_to(home, 2)
    assert bool(moved) == ("collective_permute" in call.lower(state).as_text())
