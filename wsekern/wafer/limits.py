"""Limits of the machine that runs: how many tiles of others fit, and what XLA can compile."""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from wsekern.hardware import accelerator
from wsekern.wafer.platforms import traced_platform

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

_EMULATED_BYTES = 8 * 2**20  # for a device that is not in `wsekern.hardware`
_MEMORY_SHARE = 64  # 1/64 of an accelerator's memory leaves room for the model
_SRAM_SHARE = 4  # 1/4 of a PE's SRAM, half of which is code


def gather_limit(wafer: "Wafer") -> int:
    """The most bytes of other PEs' tiles that one PE may hold."""
    if wafer.machine is not None:
        return wafer.machine.sram_bytes // _SRAM_SHARE
    chip = accelerator(wafer.device_kind or "")
    return _EMULATED_BYTES if chip is None else chip.memory_bytes // _MEMORY_SHARE


def fits_gathered(gathered_bytes: int, wafer: "Wafer") -> bool:
    """Whether a PE can hold `gathered_bytes` of gathered tiles; if not, pass tiles one by one."""
    return gathered_bytes <= gather_limit(wafer)


def keeps_shares(wafer: "Wafer") -> bool:
    """Whether each wafer sums and keeps a share of a gradient that all wafers have a part of.

    A train state that is split over wafers needs no more, and one that is not gathers the shares,
    in the operands' dtype. CPU devices have one collective less to wait for if all sum all.
    """
    return on_accelerators(wafer) and wafer.wafers > 1


def on_accelerators(wafer: "Wafer") -> bool:
    """Whether every PE is a TPU or a GPU, there or not."""
    return wafer.backend == "devices" and wafer.platform in ("tpu", "gpu")


def sum_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype in which products of `dtype` are summed: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def widen_for_backend(
    a: Shaped[Array, "..."], b: Shaped[Array, "..."]
) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """The factors of a product summed over the rows of both, in dtypes the backend can multiply.

    XLA's CPU backend in jax 0.10 rejects some such products in 16 bits ("BF16 x BF16 = F32"). There
    both factors are widened to the dtype of the sum; elsewhere they are returned as they are.
    """
    if traced_platform() != "cpu":
        return a, b
    return a.astype(sum_dtype(a.dtype)), b.astype(sum_dtype(b.dtype))
