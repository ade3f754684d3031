"""The time of the same work on GPUs and TPUs at their roofline, for comparison.

Weights (of the chosen experts alone) are read once for a batch, each sequence's cache once. A GPU
launches a few kernels for each layer. Nothing is lost to links between chips or to too little
parallel work. Real systems reach a fraction: 8 A100 decode LLaMA3-8B at 128 tokens/s (WaferLLM,
OSDI 2025, table 2), an eighth.
"""

from __future__ import annotations

import dataclasses
import math

from models.config import DecoderConfig
from models.planning.parts import BYTES, Mode
from wsekern.hardware import Accelerator

# Kernels of a layer, if all else is fused into them: queries, keys and values; attention; its
# output; the two halves of the MLP. A backward pass launches two for each.
_KERNELS = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chips:
    """A number of chips, and their seconds for a token, for the prompts, or for a training step."""

    chip: Accelerator
    count: int
    seconds: float


def chips_of(
    config: DecoderConfig,
    parameters: int,
    mode: Mode,
    chip: Accelerator,
    context: int,
    batch: int,
    count: int | None = None,
) -> Chips:
    """The roofline of `count` chips; by default the smallest power of two that has the memory.

    Training stores parameters, gradients and the optimizer's two moments: 16 bytes a parameter.

    Args:
      config: the model's.
      parameters: how many it has.
      mode: "decode", "prefill" or "train".
      chip: the kind of chip.
      context: tokens of a sequence.
      batch: sequences.
      count: how many chips.
    """
    cache = batch * sum(
        2 * BYTES * config.d_kv * min(kind.window or context, context) for kind in config.kinds
    )
    stored = parameters * 16 if mode == "train" else parameters * BYTES + cache
    if count is None:
        count = 2 ** max(0, math.ceil(math.log2(stored / chip.memory_bytes)))
    forward = config.flops_per_token(context) / 3
    flops = {"decode": forward, "prefill": forward * context, "train": 3 * forward * context}
    moved: float = {"decode": cache, "prefill": 0, "train": 2 * stored}[mode]
    moved += (
        _parameters_used(config, parameters, batch * (1 if mode == "decode" else context)) * BYTES
    )
    seconds = max(batch * flops[mode] / chip.bfloat16_flops, moved / chip.memory_bytes_per_second)
    launches = (_KERNELS * config.layers + 1) * (3 if mode == "train" else 1)
    return Chips(chip=chip, count=count, seconds=seconds / count + launches * chip.launch_seconds)


def _parameters_used(config: DecoderConfig, parameters: int, tokens: int) -> float:
    """Parameters that `tokens` tokens use: of the experts, the expected number that is chosen."""
    if config.experts is None:
        return parameters
    experts = config.experts
    size = (3 if config.gated else 2) * config.d_model * experts.d_ff
    unused = experts.count * (1 - experts.chosen / experts.count) ** tokens
    return parameters - sum(kind.sparse for kind in config.kinds) * size * unused
