"""This file is the compiled programs of a run: the first state, the step, the evaluation."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from models.config import DecoderConfig
from models.decoder import Decoder
from sharding.state import initialise, lay_out, pad
from training.config import TrainingConfig
from training.optimiser import decay_mask, make_optimiser
from training.step import Metrics, TrainState, initial_state, mean_loss, train_step
from wsekern import layout
from wsekern.axes import ROWS, WAFERS
from wsekern.wafer import Wafer

_BATCH = P(WAFERS, ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a run executes on its wafer; make it with `compile_programs`."""

    wafer: Wafer
    graph: nnx.GraphDef  # the model without its parameters
    shapes: Any  # of the train state: ShapeDtypeStructs that say where each array lies
    step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
    evaluate: Callable[[nnx.State, jax.Array, jax.Array], jax.Array]
    make_state: Callable[[], TrainState]
    compile_seconds: float
    temporary_bytes: int  # of one step on one device

    def first_state(self) -> TrainState:
        """The state before the first step, laid out on the wafer."""
        with self.wafer:
            return initialise(self.make_state, self.wafer)

    def put(self, tokens: np.ndarray) -> jax.Array:
        """A batch `[B, T]` of tokens where the step wants it; every host holds the whole batch."""
        sharding = self.wafer.sharding(_batch_spec(tokens.shape, self.wafer))
        return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def compile_programs(config: TrainingConfig, sizes: DecoderConfig, wafer: Wafer) -> Programs:
    """The programs of a run, compiled ahead of its first step.

    Args:
      config: of the run.
      sizes: of the model.
      wafer: where it runs.
    """
    start = time.monotonic()

    def make_model(rngs: nnx.Rngs) -> Decoder:
        return Decoder(sizes, rngs=rngs, dtype=config.dtype, remat=config.remat)

    skeleton = nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))
    graph = nnx.graphdef(skeleton)
    optimiser = make_optimiser(config, decay_mask=decay_mask)

    def make_state() -> TrainState:
        return initial_state(make_model, optimiser, config.seed)

    shapes = _placed(jax.eval_shape(lambda: pad(make_state(), wafer)), wafer)
    length = config.context or sizes.context
    spec = _batch_spec((config.batch, length), wafer)
    tokens = jax.ShapeDtypeStruct((config.batch, length), np.int32, sharding=wafer.sharding(spec))
    with wafer:
        step = _compile(
            train_step(graph, optimiser, config.passes),
            (shapes, tokens, tokens),
            out_shardings=(lay_out(shapes, wafer), wafer.sharding(P())),
            donate_argnums=0,
        )
        evaluate = _compile(
            lambda params, inputs, targets: mean_loss(graph, params, inputs, targets),
            (shapes["params"], tokens, tokens),
        )
    return Programs(
        wafer=wafer,
        graph=graph,
        shapes=shapes,
        step=step,
        evaluate=evaluate,
        make_state=make_state,
        compile_seconds=time.monotonic() - start,
        temporary_bytes=step.memory_analysis().temp_size_in_bytes,
    )


def _compile(function: Callable, shapes: tuple, **options: Any) -> jax.stages.Compiled:
    return jax.jit(function, **options).lower(*shapes).compile()


def _placed(shapes: Any, wafer: Wafer) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        lay_out(shapes, wafer),
    )


def _batch_spec(shape: tuple[int, ...], wafer: Wafer) -> P:
    # A length that does not divide by the rows of the grid is padded inside the operations.
    divides = layout.padded_shape(shape, _BATCH, wafer) == tuple(shape)
    return _BATCH if divides else P(WAFERS)
