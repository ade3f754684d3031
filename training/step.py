"""This file is one step of training: loss, gradient, update, as one program on one train state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

import wsekern as wk
from sharding.state import logical

# {"step": int32, "params": nnx.State, "optimizer": optax's state}
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]


def initial_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """The state before the first step; pass it to `sharding.state.initialize` as a thunk."""
    return state_of(nnx.state(make_model(nnx.Rngs(seed))), optimizer)


def state_of(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step of a model that has parameters already."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "optimizer": optimizer.init(params),
    }


def mean_loss(
    graph: nnx.GraphDef, params: nnx.State, inputs: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, ""]:
    """The mean cross-entropy of `targets` given `inputs`, in nats a token."""
    return _losses(graph, params, inputs, targets)[0]


def _losses(graph, params, inputs, targets):
    """The mean cross-entropy, and the load-balance loss of a mixture of experts, weighed."""
    model = nnx.merge(graph, logical(params))
    hidden, balance = model.hidden(inputs)
    loss = wk.cross_entropy(model.logits(hidden), targets).mean()
    experts = model.config.experts
    return loss, jnp.zeros(()) if experts is None else experts.balance * balance


def evaluation(
    graph: nnx.GraphDef, parts: int = 1
) -> Callable[[nnx.State, jax.Array, jax.Array], jax.Array]:
    """A function of parameters and a batch, for `jax.jit`: the mean loss, in nats a token.

    Args:
      graph: the model without its parameters.
      parts: into how many micro-batches the batch is divided.
    """

    def evaluate(params, inputs, targets):
        def add(total, part):
            return total + mean_loss(graph, params, *part), None

        first = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, first, _divided(parts, inputs, targets))[0] / parts

    return evaluate


def train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """A function of a state and a batch, for `jax.jit`: the next state, and what was measured.

    Args:
      graph: the model without its parameters (`nnx.graphdef`).
      optimizer: what turns gradients into updates.
      parts: into how many micro-batches the batch is divided; their gradients are summed in
        float32, so that the update is that of the whole batch and the memory that of one part.
    """

    def gradient(params, inputs, targets):
        def objective(params):
            loss, balance = _losses(graph, params, inputs, targets)
            return loss + balance, loss

        (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, gradients

    def accumulated(params, inputs, targets):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        first = (jnp.zeros((), jnp.float32), zeros)
        total, _ = jax.lax.scan(add, first, _divided(parts, inputs, targets))
        return jax.tree.map(lambda t: t / parts, total)

    def step(state, inputs, targets):
        compute = gradient if parts == 1 else accumulated
        loss, gradients = compute(state["params"], inputs, targets)
        return apply_gradients(optimizer, state, loss, gradients)

    return step


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    loss: Float[Array, ""],
    gradients: nnx.State,
) -> tuple[TrainState, Metrics]:
    """The state after the one step that `gradients` ask for, and what was measured."""
    updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
    after = {
        "step": state["step"] + 1,
        "params": optax.apply_updates(state["params"], updates),
        "optimizer": moments,
    }
    return after, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}


def _divided(parts: int, *batch: jax.Array) -> tuple[jax.Array, ...]:
    # Part j takes every parts-th sequence, so that each wafer keeps working on its own.
    return tuple(a.reshape(-1, parts, a.shape[1]).swapaxes(0, 1) for a in batch)
