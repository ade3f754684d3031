"""This file is the plan of a run, and its compiled programs: first state, step, evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding

from models.config import DecoderConfig
from models.decoder import Decoder
from sharding.state import initialize, lay_out, pad
from training.config import TrainingConfig
from training.optimizer import make_optimizer
from training.step import Metrics, TrainState, evaluation, initial_state, state_of, train_step
from wsekern.wafer import layout
from wsekern.wafer.axes import ROWS, WAFERS
from wsekern.wafer.wafer import Wafer

_BATCH = P(WAFERS, ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will execute and where its state will lie; make it with `make_plan`."""

    config: TrainingConfig
    sizes: DecoderConfig
    wafer: Wafer
    graph: nnx.GraphDef  # the model without its parameters
    optimizer: optax.GradientTransformation
    make_state: Callable[[], TrainState]
    shapes: Any  # of the train state: ShapeDtypeStructs that say where each array lies
    read_params: Callable[[], nnx.State] | None  # a checkpoint's; None: random ones

    @property
    def context(self) -> int:
        """Length of a sequence, tokens."""
        return self.config.context or self.sizes.context

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all sequences of a step."""
        return self.config.batch * self.context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """What a run executes on its wafer; make it with `compile_programs`."""

    plan: Plan
    step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
    evaluate: Callable[[nnx.State, jax.Array, jax.Array], jax.Array]
    temporary_bytes: int | None  # of a step, on one device; None where it is not known

    def first_state(self) -> TrainState:
        """The state before the first step, laid out on the wafer."""
        plan = self.plan
        with plan.wafer:
            if plan.read_params is None:
                return initialize(plan.make_state, plan.wafer)

            def build(params):
                return pad(state_of(params, plan.optimizer), plan.wafer)

            return jax.jit(build, out_shardings=lay_out(plan.shapes, plan.wafer))(
                plan.read_params()
            )

    def put(self, tokens: np.ndarray) -> jax.Array:
        """A batch `[B, T]` of tokens where the step wants it; every host holds the whole batch."""
        sharding = _batch_sharding(self.plan)
        return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def make_plan(
    config: TrainingConfig,
    sizes: DecoderConfig,
    wafer: Wafer,
    read_params: Callable[[], nnx.State] | None = None,
) -> Plan:
    """The plan of a run; nothing is computed yet.

    Args:
      config: of the run.
      sizes: of the model.
      wafer: where it runs.
      read_params: gives the parameters to start from, on the wafer; None: random ones.
    """

    def make_model(rngs: nnx.Rngs) -> Decoder:
        return Decoder(sizes, rngs=rngs, dtype=config.dtype, remat=config.remat)

    optimizer = make_optimizer(config)

    def make_state() -> TrainState:
        return initial_state(make_model, optimizer, config.seed)

    return Plan(
        config=config,
        sizes=sizes,
        wafer=wafer,
        graph=nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))),
        optimizer=optimizer,
        make_state=make_state,
        read_params=read_params,
        shapes=_placed(jax.eval_shape(lambda: pad(make_state(), wafer)), wafer),
    )


def compile_programs(plan: Plan) -> Programs:
    """The programs of a run, compiled ahead of its first step."""
    graph, wafer, shapes = plan.graph, plan.wafer, plan.shapes
    batch = (plan.config.batch, plan.context)
    tokens = jax.ShapeDtypeStruct(batch, np.int32, sharding=_batch_sharding(plan))
    with wafer:
        step = _compile(
            train_step(graph, plan.optimizer, plan.config.passes),
            (shapes, tokens, tokens),
            out_shardings=(lay_out(shapes, wafer), wafer.sharding(P())),
            donate_argnums=0,
        )
        evaluate = _compile(
            evaluation(graph, plan.config.passes), (shapes["params"], tokens, tokens)
        )
    memory = step.memory_analysis()
    return Programs(
        plan=plan,
        step=step,
        evaluate=evaluate,
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def _compile(function: Callable, shapes: tuple, **options: Any) -> jax.stages.Compiled:
    return jax.jit(function, **options).lower(*shapes).compile()


def _placed(shapes: Any, wafer: Wafer) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        lay_out(shapes, wafer),
    )


def _batch_sharding(plan: Plan) -> Sharding:
    # A length that does not divide by the rows of the grid is padded inside the operations.
    shape = (plan.config.batch, plan.context)
    divides = layout.padded_shape(shape, _BATCH, plan.wafer) == shape
    return plan.wafer.sharding(_BATCH if divides else P(WAFERS))
