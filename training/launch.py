"""This file is what has to happen before jax starts, and the wafer that a configuration asks for.

jax prefers TPUs and GPUs to the CPU by itself, so only the CPU is ever asked for by name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wsekern.wafer.launch import emulate_devices

if TYPE_CHECKING:
    from training.config import TrainingConfig
    from wsekern.wafer.wafer import Wafer

_MOST_DEVICES = 1024  # emulated; with them a move takes 0.2 s


def prepare(config: TrainingConfig) -> None:
    """Chooses the platform and makes the CPU devices that `config` needs; call it before jax.

    Raises:
      ValueError: so many devices cannot be emulated.
      RuntimeError: jax has already started with fewer CPU devices.
    """
    if config.platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    if config.platform in (None, "cpu"):
        if config.pes > _MOST_DEVICES and not config.virtual:
            raise ValueError(
                f"wafer={config.wafer!r} needs {config.pes} devices, of which no more than "
                f"{_MOST_DEVICES} can be emulated; choose a smaller --wafer, or --virtual for PEs "
                "that share one device"
            )
        emulate_devices(1 if config.virtual else config.pes)


def make_wafer(config: TrainingConfig) -> Wafer:
    """The wafer that `config` names, on the devices that jax has.

    Raises:
      ValueError: there are fewer devices than PEs, or the platform is not to be had.
    """
    import jax

    import wsekern as wk

    try:
        devices = jax.devices(config.platform)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"platform={config.platform!r} cannot be used here ({error}); choose another "
            "--platform, or install the jax of that kind of device"
        ) from None
    if devices[0].platform != jax.devices()[0].platform:
        raise ValueError(
            f"platform={config.platform!r}: jax has already started, on "
            f"{jax.devices()[0].platform}; make the trainer before jax is used, or set "
            f"JAX_PLATFORMS={config.platform}"
        )
    wafers, height, width = config.grid
    if config.virtual:
        return wk.Wafer.virtual(wk.WSE3, height, width, wafers)
    if config.pes > len(devices):
        raise ValueError(
            f"wafer={config.wafer!r} needs {config.pes} devices, there are {len(devices)} of kind "
            f"{devices[0].device_kind!r}; choose a smaller --wafer, or --platform cpu to emulate "
            "them, or --virtual for PEs that share one device"
        )
    return wk.Wafer.devices(height, width, wafers)
