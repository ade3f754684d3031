"""Round floating weights to integers of eight or four bits, on the host.

The scale of a group is that of the formats Q8_0 and Q4_1 of GGUF.
"""

import numpy as np
from jaxtyping import Float, Int8

from models.quantized import GROUP, LARGEST, Parts

_MOST4 = 15  # the largest integer of four bits


def round_by_output(weight: Float[np.ndarray, "*E I O"]) -> Parts:
    """`weight` as int8 with one scale for each output channel."""
    scales = _nonzero(np.abs(weight).max(-2) / np.float32(LARGEST))
    return Parts(_integers(weight / scales[..., None, :]), scales)


def round_to_int8_groups(weight: Float[np.ndarray, "*E I O"]) -> Parts:
    """`weight` as int8 in groups of 32 along the inputs."""
    groups = _in_groups(weight)
    scales = _halved(np.abs(groups).max(-2) / np.float32(LARGEST))
    return Parts(_integers(groups / _nonzero(scales)[..., None, :]), scales)


def round_to_int4_groups(weight: Float[np.ndarray, "*E I O"]) -> Parts:
    """`weight` as int4 in groups of 32 along the inputs, with minima."""
    groups = _in_groups(weight)
    minima = _halved(groups.min(-2))
    spread = groups.max(-2) - minima.astype(np.float32)
    scales = _halved(np.maximum(spread, 0) / np.float32(_MOST4))
    shifted = groups - minima.astype(np.float32)[..., None, :]
    values = _integers(shifted / _nonzero(scales)[..., None, :], 0, _MOST4).view(np.uint8)
    half = GROUP // 2
    return Parts(values[..., :half, :] | values[..., half:, :] << 4, scales, minima)


def round_table(table: Float[np.ndarray, "V D"]) -> Parts:
    """`table` as int8 with one scale for each row."""
    scales = _nonzero(np.abs(table).max(-1) / np.float32(LARGEST))
    return Parts(_integers(table / scales[..., None]), scales)


def _integers(
    quotients: Float[np.ndarray, "..."], least: int = -LARGEST, most: int = LARGEST
) -> Int8[np.ndarray, "..."]:
    # A NaN becomes any integer: its scale is NaN, and so is what it is widened to.
    with np.errstate(invalid="ignore"):
        return np.clip(np.rint(quotients), least, most).astype(np.int8)


def _in_groups(weight: Float[np.ndarray, "*E I O"]) -> Float[np.ndarray, "*E G 32 O"]:
    *leading, d_in, d_out = weight.shape
    return weight.reshape(*leading, d_in // GROUP, GROUP, d_out)


def _halved(numbers: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """`numbers` in float16."""
    if (largest := np.abs(numbers).max(initial=0)) > np.finfo(np.float16).max:
        raise ValueError(
            f"a weight of {largest:.3g} is beyond what float16 scales hold; use weights='int8'"
        )
    return numbers.astype(np.float16)


def _nonzero(scales: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    wide = scales.astype(np.float32)
    return np.where(wide == 0, np.float32(1), wide)
