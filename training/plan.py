"""The plan of a run: the model's graph, the optimizer, and the layout of the train state.

Nothing is computed here: arrays are known by their shapes. So a step of a plan can be traced, or
priced by `wsekern.estimate`, for a wafer that is not there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx

from models.config import DecoderConfig
from models.decoder import Decoder
from sharding.rules import Home
from sharding.state import lay_out, pad
from training.config import TrainingConfig
from training.optimizer import make_optimizer
from training.step import TrainState, initial_state
from wsekern.wafer.wafer import Wafer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run computes, and where its state lies; make it with `make_plan`."""

    config: TrainingConfig
    sizes: DecoderConfig
    wafer: Wafer
    graph: nnx.GraphDef  # the model without its parameters
    optimizer: optax.GradientTransformation
    make_state: Callable[[], TrainState]
    shapes: Any  # the train state as ShapeDtypeStructs with shardings
    read_params: Callable[[], nnx.State] | None  # reads a checkpoint's; None: random

    @property
    def context(self) -> int:
        """Tokens in a sequence."""
        return self.config.context or self.sizes.context

    @property
    def home(self) -> Home:
        """Where the train state lies."""
        return _home(self.config)

    @property
    def tokens_per_step(self) -> int:
        """Tokens in all sequences of a step."""
        return self.config.batch * self.context


def make_plan(
    config: TrainingConfig,
    sizes: DecoderConfig,
    wafer: Wafer,
    read_params: Callable[[], nnx.State] | None = None,
) -> RunPlan:
    """The plan of a run; nothing is computed yet.

    Args:
      config: every choice of the run.
      sizes: the model's sizes.
      wafer: where the run takes place.
      read_params: reads the parameters to start from onto the wafer; None: random ones.
    """

    home = _home(config)

    def make_model(rngs: nnx.Rngs) -> Decoder:
        return Decoder(sizes, rngs=rngs, dtype=config.dtype, remat=config.remat, home=home)

    optimizer = make_optimizer(config)

    def make_state() -> TrainState:
        return initial_state(make_model, optimizer, config.seed)

    return RunPlan(
        config=config,
        sizes=sizes,
        wafer=wafer,
        graph=nnx.graphdef(nnx.eval_shape(lambda: make_model(nnx.Rngs(0)))),
        optimizer=optimizer,
        make_state=make_state,
        read_params=read_params,
        shapes=_with_layout(jax.eval_shape(lambda: pad(make_state(), wafer, home)), wafer, home),
    )


def _home(config: TrainingConfig) -> Home:
    return "memoryx" if config.split_state else "wafer"


def _with_layout(shapes: Any, wafer: Wafer, home: Home) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        lay_out(shapes, wafer, home),
    )
