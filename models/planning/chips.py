"""This file is what GPUs and TPUs make of the same work at their roofline.

Weights, of experts those that are chosen, are read once for a batch, and each sequence's cache
once; nothing is lost between chips, in launches, or for want of parallel work. Real systems reach a
part of it: 8 A100 decode LLaMA3-8B at 128 tokens/s (WaferLLM, OSDI 2025, table 2), an eighth.
"""

from __future__ import annotations

import dataclasses
import math

from models.config import DecoderConfig
from models.planning.parts import BYTES, Mode
from wsekern.hardware import Accelerator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chips:
    """As many chips as hold a model, and the seconds of a token, of prompts, or of a step."""

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
    """The roofline of `count` chips; by default of the least power of two that has the memory.

    Training holds parameters, gradients and the optimizer's two moments: 16 bytes a parameter.
    """
    cache = batch * sum(
        2 * BYTES * config.d_kv * min(kind.window or context, context) for kind in config.kinds
    )
    held = parameters * 16 if mode == "train" else parameters * BYTES + cache
    if count is None:
        count = 2 ** max(0, math.ceil(math.log2(held / chip.memory_bytes)))
    forward = config.flops_per_token(context) / 3
    flops = {"decode": forward, "prefill": forward * context, "train": 3 * forward * context}
    moved: float = {"decode": cache, "prefill": 0, "train": 2 * held}[mode]
    moved += _met(config, parameters, batch * (1 if mode == "decode" else context)) * BYTES
    seconds = max(batch * flops[mode] / chip.bfloat16_flops, moved / chip.memory_bytes_per_second)
    return Chips(chip=chip, count=count, seconds=seconds / count)


def _met(config: DecoderConfig, parameters: int, tokens: int) -> float:
    """Parameters that so many tokens meet: of experts, as many as are likely to be chosen."""
    if config.experts is None:
        return parameters
    of = config.experts
    one = (3 if config.gated else 2) * config.d_model * of.d_ff
    unused = of.count * (1 - of.chosen / of.count) ** tokens
    return parameters - sum(kind.sparse for kind in config.kinds) * one * unused
