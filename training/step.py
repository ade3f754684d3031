"""One step of training as one program on one train state: loss, gradient, update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

import wsekern as wk
from sharding.state import logical
from wsekern.wafer.axes import ROWS, WAFERS

# {"step": int32, "params": nnx.State, "optimizer": optax's state}. The keys are saved to disk: if
# one is renamed, `training.manifest` must know its old name, or old checkpoints do not restore.
TrainState = dict[str, Any]
Metrics = dict[str, jax.Array]

Tokens = Int[Array, "B T"]
Scalar = Float[Array, ""]

_BATCH = P(WAFERS, ROWS)


def initial_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    """The state before the first step, with random parameters.

    To lay it out on a wafer, pass `lambda: initial_state(...)` to `sharding.state.initialize`.
    """
    return state_of(nnx.state(make_model(nnx.Rngs(seed))), optimizer)


def state_of(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, with the parameters given."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "optimizer": optimizer.init(params),
    }


def mean_loss(graph: nnx.GraphDef, params: nnx.State, inputs: Tokens, targets: Tokens) -> Scalar:
    """The mean cross-entropy of `targets` given `inputs`, in nats a token."""
    return _losses(graph, params, inputs, targets)[0]


def _losses(
    graph: nnx.GraphDef, params: nnx.State, inputs: Tokens, targets: Tokens
) -> tuple[Scalar, Scalar]:
    """The mean cross-entropy, and the weighted load-balance loss of a mixture of experts."""
    # Padding is cut off first: it must not take part in a norm or in the softmax of the logits.
    model = nnx.merge(graph, logical(params))
    hidden, balance = model.hidden(inputs)
    loss = wk.cross_entropy(model.logits(hidden), targets).mean()
    experts = model.config.experts
    return loss, jnp.zeros(()) if experts is None else experts.balance * balance


def evaluation(
    graph: nnx.GraphDef, parts: int = 1
) -> Callable[[nnx.State, jax.Array, jax.Array], jax.Array]:
    """A function from parameters and a batch to the mean loss, in nats a token; for `jax.jit`.

    Args:
      graph: the model without its parameters.
      parts: the number of micro-batches that the batch is split into, to save memory.
    """

    def evaluate(params: nnx.State, inputs: Tokens, targets: Tokens) -> Scalar:
        def add(total: Scalar, part: tuple[Tokens, Tokens]) -> tuple[Scalar, None]:
            return total + mean_loss(graph, params, *part), None

        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, zero, _split(parts, inputs, targets))[0] / parts

    return evaluate


def train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, parts: int = 1
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """A function from a state and a batch to the next state and its metrics; for `jax.jit`.

    The metrics are "loss" (nats a token) and "gradient_norm".

    Args:
      graph: the model without its parameters (`nnx.graphdef`).
      optimizer: turns gradients into updates.
      parts: the number of micro-batches that the batch is split into. Their gradients are summed in
        float32: the update is that of the whole batch, the memory that of one micro-batch.
    """

    def gradient(params: nnx.State, inputs: Tokens, targets: Tokens) -> tuple[Scalar, nnx.State]:
        def objective(params: nnx.State) -> tuple[Scalar, Scalar]:
            loss, balance = _losses(graph, params, inputs, targets)
            return loss + balance, loss

        # The loss of the metrics leaves the balance out, so that it compares with the validation's.
        (_, loss), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, gradients

    def accumulate(params: nnx.State, inputs: Tokens, targets: Tokens) -> tuple[Scalar, nnx.State]:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        def add(
            total: tuple[Scalar, nnx.State], part: tuple[Tokens, Tokens]
        ) -> tuple[tuple[Scalar, nnx.State], None]:
            return jax.tree.map(jnp.add, total, gradient(params, *part)), None

        first = (jnp.zeros((), jnp.float32), zeros)
        total, _ = jax.lax.scan(add, first, _split(parts, inputs, targets))
        return jax.tree.map(lambda t: t / parts, total)

    def step(state: TrainState, inputs: Tokens, targets: Tokens) -> tuple[TrainState, Metrics]:
        compute = gradient if parts == 1 else accumulate
        loss, gradients = compute(state["params"], inputs, targets)
        return apply_gradients(optimizer, state, loss, gradients)

    return step


def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, loss: Scalar, gradients: nnx.State
) -> tuple[TrainState, Metrics]:
    """The state after one step with `gradients`, and the metrics of that step."""
    updates, moments = optimizer.update(gradients, state["optimizer"], state["params"])
    after = {
        "step": state["step"] + 1,
        "params": optax.apply_updates(state["params"], updates),
        "optimizer": moments,
    }
    return after, {"loss": loss, "gradient_norm": optax.tree.norm(gradients)}


def is_finite(state: TrainState) -> Bool[Array, ""]:
    """Whether a state holds neither NaN nor infinity, in its parameters or in its moments."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return functools.reduce(jnp.logical_and, [jnp.isfinite(leaf).all() for leaf in leaves])


def _split(
    parts: int, inputs: Tokens, targets: Tokens
) -> tuple[Int[Array, "P b T"], Int[Array, "P b T"]]:
    # Micro-batch j takes every parts-th sequence, so that each wafer keeps its own sequences:
    #   batch 0 1 2 3 | 4 5 6 7 on two wafers, two parts  ->  0 2 | 4 6, then 1 3 | 5 7
    def split(a: Tokens) -> Int[Array, "P b T"]:
        return wk.layout.reshape(a, (-1, parts, a.shape[1]), _BATCH).swapaxes(0, 1)

    return split(inputs), split(targets)
