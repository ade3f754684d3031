"""Whether XLA's CPU backend has threads enough for the devices that it emulates.

Each device of a program with a collective waits in a thread of its own, and each device of the next
program takes one more. With jax 0.10, a loop of about a hundred calls that nobody waits for hangs
where there are fewer threads than both programs need, and aborts after a while.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

FLAG = "--xla_force_host_platform_device_count"
VARIABLE = "JAX_NUM_CPU_DEVICES"  # which jax takes before the flag
_warned = False
_threads_at_start: int | None = None  # of a backend that ran already when devices were asked for


def check_threads(mesh: Mesh) -> None:
    """Warns once if the devices of a mesh are emulated, with fewer than two threads each."""
    import jax

    here = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    if len(here) > 1 and here[0].platform == "cpu":
        warn_if_few(len(here), stacklevel=4)


def warn_if_few(count: int, stacklevel: int) -> None:
    """Warns once if the CPU backend, which has started, has fewer than `2 * count` threads.

    Args:
      count: of the devices that run one program.
      stacklevel: of the line to warn about, as for `warnings.warn`.
    """
    import jax

    global _warned
    threads = _threads_at_start or _threads_of_backend(jax.local_device_count("cpu"))
    if threads >= 2 * count or _warned:
        return
    _warned = True
    warnings.warn(
        f"{count} CPU devices share {threads} threads: a loop of calls that nobody waits for hangs "
        f"with jax 0.10, and then aborts; call wsekern.emulate_devices({count}) before jax starts, "
        f"instead of setting {FLAG} or {VARIABLE}, or set NPROC={2 * count} too",
        RuntimeWarning,
        stacklevel=stacklevel,
    )


def backend_has_started(devices: int) -> None:
    """Keeps in mind how many threads the backend has; call it before `NPROC` is changed."""
    global _threads_at_start
    if _threads_at_start is None:
        _threads_at_start = _threads_of_backend(devices)


def _threads_of_backend(devices: int) -> int:
    """How many threads XLA's CPU backend has, which reads `NPROC` when it starts."""
    given = os.environ.get("NPROC", "")
    if given.isdigit() and int(given):
        return max(int(given), devices)
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), devices)
    return max(os.cpu_count() or 1, devices)
