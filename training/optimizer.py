"""AdamW with clipped gradients and a learning-rate schedule.

I. Loshchilov and F. Hutter, "Decoupled Weight Decay Regularization", 2019. The schedule that stays
constant before its decay (wsd) is that of S. Hu et al., "MiniCPM", 2024.
"""

from typing import Any

import jax
import optax
from flax import nnx

from training.config import TrainingConfig


def learning_rate_schedule(config: TrainingConfig) -> optax.Schedule:
    """The learning rate by number of updates: a linear warm-up, then the course `config` names."""
    highest, lowest = config.learning_rate, config.final_learning_rate
    warmup = min(config.warmup, config.steps)
    after = config.steps - warmup
    if config.schedule == "cosine":
        course = optax.cosine_decay_schedule(highest, max(1, after), lowest / highest)
    elif config.schedule == "wsd":
        decay = min(after, round(config.decay_fraction * config.steps))
        fall = optax.linear_schedule(highest, lowest, max(1, decay))
        course = optax.join_schedules([optax.constant_schedule(highest), fall], [after - decay])
    else:
        course = optax.constant_schedule(highest)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, highest, max(1, warmup)), course], [warmup]
    )


def decay_mask(params: Any) -> Any:
    """True for each parameter that decays: one with two axes or more, not counting "layer"."""

    def decays(leaf: nnx.Variable) -> nnx.Variable:
        axes = leaf.get_metadata().get("axes") or ()
        return leaf.replace(len([axis for axis in axes if axis != "layer"]) >= 2)

    return jax.tree.map(decays, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformation:
    """AdamW as `config` says.

    A parameter that is zero, and whose gradient is always zero, stays zero: padding does.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if not config.clip_norm:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
