"""A model of one's own, laid out and trained by the public names of `sharding` alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sharding
import wsekern as wk


class Regression(nnx.Module):
    """Two products; no size divides by the grid."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Param(0.3 * jax.random.normal(rngs.params(), (6, 10)), axes=("in", "out"))
        self.last = nnx.Param(0.3 * jax.random.normal(rngs.params(), (10, 5)), axes=("in", "out"))

    def __call__(self, x):
        return wk.matmul(jnp.tanh(wk.matmul(x, self.first[...])), self.last[...])


OPTIMIZER = optax.adamw(1e-2)
GRAPH = nnx.graphdef(nnx.eval_shape(lambda: Regression(nnx.Rngs(0))))


def make_state():
    params = nnx.state(Regression(nnx.Rngs(0)))
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def loss_of(params, x, y):
    return jnp.mean((nnx.merge(GRAPH, sharding.logical(params))(x) - y) ** 2)


def step(state, x, y):
    loss, gradients = jax.value_and_grad(loss_of)(state["params"], x, y)
    updates, moments = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": moments}, loss


def losses_on(wafer):
    x, y = jax.random.normal(jax.random.key(1), (8, 6)), jnp.ones((8, 5))
    state = sharding.initialize(make_state, wafer)
    layout = sharding.lay_out(state, wafer)
    compiled = jax.jit(step, out_shardings=(layout, None), donate_argnums=0)
    losses = []
    for _ in range(3):
        state, loss = compiled(state, x, y)
        losses.append(float(loss))
    return losses


def test_a_model_of_ones_own_trains_alike_on_one_device_and_on_a_wafer():
    alone = losses_on(None)
    with wk.Wafer.devices(2, 4) as wafer:
        np.testing.assert_allclose(losses_on(wafer), alone, rtol=1e-5)
    assert alone[-1] < alone[0]


def test_the_names_of_release_0_1_still_work():
    from sharding.explain import Placement, explain, table
    from sharding.state import initialise

    assert initialise is sharding.initialize and explain is sharding.explain_state
    assert Placement is sharding.ArrayPlacement and table is sharding.placement_table
