"""Choose what computes a tile of attention: a kernel of the platform's, or blocks in jnp."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax.numpy as jnp

from wsekern.kernels.attention import splash
from wsekern.kernels.attention.operands import Floats, Order, Segments
from wsekern.wafer.platforms import Platform
from wsekern.wafer.wafer import Wafer

# "xla": blocks in jnp. "splash": JAX's Pallas kernel for TPUs. "cudnn": of NVIDIA GPUs. "pallas":
# our Pallas kernel for GPUs.
Kernel = Literal["xla", "splash", "cudnn", "pallas"]
Implementation = Literal["auto", "xla", "splash", "cudnn", "pallas"]

_PREFERRED: dict[Platform, tuple[Kernel, ...]] = {"tpu": ("splash",), "gpu": ("cudnn", "pallas")}
_IN_WORDS = {
    "xla": "blocked jnp",
    "splash": "splash attention",
    "cudnn": "cuDNN",
    "pallas": "a Pallas kernel",
}
_FEWEST_ROWS = splash.LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileTask:
    """What the tiles of one call are like."""

    floats: Floats
    segments: Segments
    causal: bool
    window: int | None
    soft_cap: float | None
    precise: bool  # a precision of the products is asked for
    order: Order
    wafer: Wafer | None
    platform: Platform

    @property
    def _rows(self) -> tuple[int, int]:
        """Rows of queries and of keys of a tile, without padding."""
        parts = 1 if self.wafer is None else self.wafer.height * (1 + (self.order == "zigzag"))
        # Whole sequences are gathered before a tile is met.
        q_parts = 1 if self.order in ("local", "ulysses") else parts
        k_parts = 1 if self.order in ("local", "ulysses", "allgather") else parts
        return self.floats.q.shape[1] // q_parts, self.floats.k.shape[1] // k_parts

    @property
    def _merges(self) -> bool:
        """Whether a row's result is made of several tiles; a sink is merged like one more."""
        return self.floats.sinks is not None or self.order in ("ring", "zigzag")


def choose_implementation(task: TileTask, asked: Implementation) -> tuple[Kernel, str]:
    """What computes the tiles, and why.

    Raises:
      ValueError: what is asked for cannot serve.
    """
    if asked != "auto":
        if reason := refused(asked, task):
            raise ValueError(
                f"attention: implementation={asked!r} cannot serve: {reason}; 'auto' takes one "
                "that can"
            )
        return asked, f"tiles by {_IN_WORDS[asked]}: asked for"
    reasons: list[str] = []
    for kernel in _PREFERRED.get(task.platform, ()):
        reason = refused(kernel, task)
        if not reason:
            why = "; ".join([f"on a {task.platform.upper()}" if task.platform else "", *reasons])
            return kernel, f"tiles by {_IN_WORDS[kernel]}: {why}"
        reasons.append(f"{_IN_WORDS[kernel]} does not serve: {reason}")
    where = "an abstract wafer" if task.platform is None else f"a {task.platform.upper()}"
    why = "; ".join(reasons) or f"no other kernel is for {where}"
    return "xla", f"tiles by {_IN_WORDS['xla']}: {why}"


def refused(kernel: Kernel, task: TileTask) -> str:
    """Why `kernel` cannot serve the tiles; empty where it can."""
    if kernel == "xla":
        return ""
    # Of a kernel, vmap would make something else.
    if task.wafer is not None and task.wafer.backend != "devices":
        return f"the PEs of a {task.wafer.backend} wafer share a device"
    if task.floats.bias is not None:
        return "a bias"
    refusals = {"splash": _splash_refused, "cudnn": _cudnn_refused, "pallas": _pallas_refused}
    return refusals[kernel](task)


def _splash_refused(task: TileTask) -> str:
    if task.platform not in ("tpu", "cpu"):  # on a CPU it is interpreted, for tests
        return f"it is a kernel for TPUs, and this is a {task.platform}"
    if task.floats.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{task.floats.q.dtype}, not float32 or bfloat16"
    return _too_few_rows(task) or _precision_refused(task) or splash.missing()


def _cudnn_refused(task: TileTask) -> str:
    q, k = task.floats.q, task.floats.k
    if task.platform != "gpu":
        return f"it is a kernel for GPUs, and this is a {task.platform}"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"{q.dtype}, not 16 bits"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"heads of {q.shape[-1]}, not a multiple of 8 up to 128"
    if task._merges:
        return "several tiles make a row, and jax.nn rounds the log-sum-exps to merge them by"
    if task.soft_cap is not None or task.segments.q is not None:
        return "a soft cap" if task.soft_cap is not None else "segments"
    if task.causal and task.order == "allgather":
        return "a PE's rows begin within the sequence"
    if task.causal and q.shape[1] != k.shape[1]:
        return "causal attention of unequally many queries and keys"
    parts = 1 if task.wafer is None else task.wafer.height
    if not task.causal and k.shape[1] % parts:
        return "keys are padded"
    return ""


def _pallas_refused(task: TileTask) -> str:
    q = task.floats.q
    if task.platform not in ("gpu", "cpu"):  # on a CPU it is interpreted, for tests
        return f"it is a kernel for GPUs, and this is a {task.platform}"
    # In float32 a GPU's tensor cores would round the operands.
    if q.dtype not in (jnp.float16, jnp.bfloat16) and task.platform == "gpu":
        return f"{q.dtype}, not 16 bits"
    if q.shape[-1] > 128:
        return f"heads of {q.shape[-1]}, more than 128"
    return _too_few_rows(task) or _precision_refused(task)


def _too_few_rows(task: TileTask) -> str:
    rows, keys = task._rows
    few, name = (rows, "rows") if rows < _FEWEST_ROWS else (keys, "keys")
    return f"a tile has {few} {name}, fewer than {_FEWEST_ROWS}" if few < _FEWEST_ROWS else ""


def _precision_refused(task: TileTask) -> str:
    return "it cannot be told a precision" if task.precise else ""
