"""The compiled programs of a run: its first state, its step, its evaluation."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import Sharding
from jaxtyping import Array, Int

from sharding.state import initialize, lay_out, pad
from training.plan import RunPlan
from training.step import Metrics, TrainState, evaluation, is_finite, state_of, train_step
from wsekern.moved import moved_names
from wsekern.wafer import layout
from wsekern.wafer.axes import ROWS, WAFERS

if not TYPE_CHECKING:  # a type checker would take every name for one of this module
    __getattr__ = moved_names(__name__)

_BATCH = P(WAFERS, ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs:
    """The compiled programs of a run on its wafer; make them with `compile_programs`."""

    plan: RunPlan
    step: Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Metrics]]
    evaluate: Callable[[nnx.State, jax.Array, jax.Array], jax.Array]
    is_finite: Callable[[TrainState], jax.Array]
    temporary_bytes: int | None  # of a step, on one device; None: the backend does not say

    def first_state(self) -> TrainState:
        """The state before the first step, laid out on the wafer."""
        plan = self.plan
        with plan.wafer:
            if plan.read_params is None:
                return initialize(plan.make_state, plan.wafer, plan.home)

            def build(params: nnx.State) -> TrainState:
                return pad(state_of(params, plan.optimizer), plan.wafer, plan.home)

            layout = lay_out(plan.shapes, plan.wafer, plan.home)
            return jax.jit(build, out_shardings=layout)(plan.read_params())

    def put(self, tokens: Int[np.ndarray, "B T"]) -> Int[Array, "B T"]:
        """A batch of tokens, laid out as the step takes it; every host holds the whole batch."""
        sharding = _batch_sharding(self.plan)
        return jax.make_array_from_callback(tokens.shape, sharding, lambda index: tokens[index])


def step_program(plan: RunPlan) -> tuple[Callable, tuple[Any, ...], dict[str, Any]]:
    """The step of a plan: the function, the shapes of its operands, and its options for `jax.jit`.

    So it can be compiled for chips that are not there: see `wsekern.compile`.
    """
    batch = (plan.config.batch, plan.context)
    tokens = jax.ShapeDtypeStruct(batch, np.int32, sharding=_batch_sharding(plan))
    options = {
        "out_shardings": (lay_out(plan.shapes, plan.wafer, plan.home), plan.wafer.sharding(P())),
        "donate_argnums": (0,),
    }
    function = train_step(plan.graph, plan.optimizer, plan.config.passes)
    return function, (plan.shapes, tokens, tokens), options


def compile_programs(plan: RunPlan) -> Programs:
    """Compiles the step and the evaluation ahead of the first step."""
    graph, wafer = plan.graph, plan.wafer
    function, operands, options = step_program(plan)
    shapes, tokens, _ = operands
    with wafer:
        step = _compile(function, operands, **options)
        evaluate = _compile(
            evaluation(graph, plan.config.passes), (shapes["params"], tokens, tokens)
        )
        finite = _compile(is_finite, (shapes,))
    memory = step.memory_analysis()
    return Programs(
        plan=plan,
        step=step,
        evaluate=evaluate,
        is_finite=finite,
        temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def _compile(function: Callable, shapes: tuple, **options: Any) -> jax.stages.Compiled:
    return jax.jit(function, **options).lower(*shapes).compile()


def _batch_sharding(plan: RunPlan) -> Sharding:
    # Sequences are split over the rows of the grid if their length divides by these. If not, every
    # row gets whole sequences, and the operations pad them.
    shape = (plan.config.batch, plan.context)
    divides = layout.padded_shape(shape, _BATCH, plan.wafer) == shape
    return plan.wafer.sharding(_BATCH if divides else P(WAFERS))
