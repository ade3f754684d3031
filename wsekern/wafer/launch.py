"""What has to happen before jax starts: emulated devices, and grids read from a command line.

Imports no jax itself.
"""

import os
import sys

_FLAG = "--xla_force_host_platform_device_count"
_VARIABLE = "JAX_NUM_CPU_DEVICES"  # which jax takes before the flag


def emulate_devices(count: int) -> None:
    """Makes the CPU look like `count` devices or more, so that a mesh runs on any machine.

    Call it before jax's backend starts, which the first array or `jax.devices()` does. It sets
    `XLA_FLAGS` for this process and its children, keeping the other flags found there, and `NPROC`
    to twice the devices unless it is larger already: with fewer threads than that, jax 0.10 hangs
    in a loop of about a hundred un-blocked calls of a program with a collective.

    Args:
      count: how many devices are needed; more, asked for before or in the environment, stay, and a
        backend that already has as many is left alone.

    Raises:
      ValueError: `count` is not positive.
      RuntimeError: jax's backend has already started with fewer devices.
    """
    if count < 1:
        raise ValueError(f"emulate_devices: count is {count}, it must be 1 or more")
    given = os.environ.get("XLA_FLAGS", "").split()
    before = [f.partition("=")[2] for f in given if f.startswith(_FLAG)]
    before.append(os.environ.get(_VARIABLE, ""))
    wanted = max(count, *(int(number) for number in before if number.isdigit()), 0)
    if "jax" in sys.modules:
        _tell_imported_jax(count, wanted)
    if _VARIABLE in os.environ:
        os.environ[_VARIABLE] = str(wanted)
    threads = max(2 * wanted, int(os.environ.get("NPROC") or 0))
    os.environ["NPROC"] = str(threads)
    others = [f for f in given if not f.startswith(_FLAG)]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{_FLAG}={wanted}"])


def _tell_imported_jax(count: int, wanted: int) -> None:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # the backend has started: what it has is what there is
        have = len(jax.devices("cpu"))
        if have < count:
            raise RuntimeError(
                f"emulate_devices: {count} CPU devices are needed, but jax has already started "
                f"with {have}; call wsekern.emulate_devices({count}) before the first array or "
                f"jax.devices(), or start with XLA_FLAGS={_FLAG}={count} NPROC={2 * count} set"
            ) from None


def parse_grid(text: str) -> tuple[int, int, int]:
    """`"2x4"` as (wafers, height, width) = (1, 2, 4), and `"3x2x4"` as (3, 2, 4).

    Raises:
      ValueError: it is not two or three positive integers with an x between them.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(
            f"wafer={text!r} is not a grid; write HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH, such as 2x4"
        )
    sizes = [int(part) for part in parts]
    if min(sizes) < 1:
        raise ValueError(f"wafer={text!r} has a side of 0; every side must be 1 or more")
    wafers, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return wafers, height, width
