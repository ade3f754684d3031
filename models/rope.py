"""The frequencies of rotary positions, and how they are stretched to a longer context.

J. Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; S. Chen et al.,
"Extending Context Window of Large Language Models via Positional Interpolation", 2023 (linear); B.
Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023; "The Llama 3
Herd of Models", 2024, whose released code has the rule called "llama3".
"""

import math

import numpy as np

from models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig) -> np.ndarray:
    """Radians that each pair of features turns by from position to position, float32 `[H/2]`."""
    exponents = np.arange(0, config.d_head, 2, dtype=np.float32) / config.d_head
    plain = 1.0 / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return stretch(plain, scaling)
    return _blend(plain, scaling, _yarn(config, scaling))


def stretch(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3's rule: frequencies with few turns in the original context are divided by `factor`.

    Between `low_frequency_factor` and `high_frequency_factor` turns, the division is blended in.
    """
    turns = scaling.original_context * plain / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return _blend(plain, scaling, np.clip((high - turns) / (high - low), 0, 1))


def _blend(plain: np.ndarray, scaling: RopeScaling, slow: np.ndarray) -> np.ndarray:
    # `slow` is how far each is stretched: 0 for fast frequencies, 1 for the slowest.
    return (plain * (1 - slow) + plain / np.float32(scaling.factor) * slow).astype(np.float32)


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """YaRN's factor on cosines and sines, for a checkpoint that does not give one."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def _yarn(config: DecoderConfig, scaling: RopeScaling) -> np.ndarray:
    """How far each frequency is stretched: a ramp from pair `low` to pair `high`."""

    def dimension(turns: float) -> float:
        """The pair of features that makes `turns` turns within the original context."""
        wave = scaling.original_context / (turns * 2 * math.pi)
        return config.d_head * math.log(wave) / (2 * math.log(config.rope_theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.d_head - 1)
    high += 0.001 if low == high else 0
    return np.clip((np.arange(config.d_head // 2) - low) / (high - low), 0, 1)
