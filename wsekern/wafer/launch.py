"""Start a program on a wafer: parse its grid, choose the platform, emulate devices, make the wafer.

Training, models, benchmarks and examples start through this module, in this order: `parse_grid`,
`prepare_devices`, then the first import of jax, then `make_wafer`. Importing it loads no jax.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Literal

from wsekern.hardware import WSE3
from wsekern.wafer import cpu_threads
from wsekern.wafer.cpu_threads import FLAG, VARIABLE
from wsekern.wafer.libtpu import keep_libtpu_quiet

if TYPE_CHECKING:
    import jax

    from wsekern.wafer.wafer import Wafer

Platform = Literal["cpu", "gpu", "tpu"]
MOST_EMULATED = 1024  # devices; with so many, one shift takes 0.2 s


def emulate_devices(count: int) -> None:
    """Makes the CPU look like `count` devices or more, so that a mesh runs on any machine.

    Call it before jax's backend starts, which the first array or `jax.devices()` does. It sets
    `XLA_FLAGS` for this process and its children, keeping the other flags found there, and `NPROC`
    to twice the devices unless it is larger already: with fewer threads than that, jax 0.10 hangs
    in a loop of about a hundred un-blocked calls of a program with a collective.

    Args:
      count: how many devices are needed; more, asked for before or in the environment, stay, and a
        backend that already has as many is left alone.

    Warns where the backend has already started with enough devices, but too few threads for them.

    Raises:
      ValueError: `count` is not positive.
      RuntimeError: jax's backend has already started with fewer devices.
    """
    if count < 1:
        raise ValueError(f"emulate_devices: count is {count}, it must be 1 or more")
    keep_libtpu_quiet()
    flags = os.environ.get("XLA_FLAGS", "").split()
    before = [f.partition("=")[2] for f in flags if f.startswith(FLAG)]
    before.append(os.environ.get(VARIABLE, ""))
    wanted = max(count, *(int(number) for number in before if number.isdigit()), 0)
    if "jax" in sys.modules:
        _tell_imported_jax(count, wanted)
    if VARIABLE in os.environ:
        os.environ[VARIABLE] = str(wanted)
    threads = max(2 * wanted, int(os.environ.get("NPROC") or 0))
    os.environ["NPROC"] = str(threads)
    others = [f for f in flags if not f.startswith(FLAG)]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{FLAG}={wanted}"])


def _tell_imported_jax(count: int, wanted: int) -> None:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # the backend has started, and its devices cannot change any more
        have = len(jax.devices("cpu"))
        cpu_threads.backend_has_started(have)
        if have >= count:
            cpu_threads.warn_if_few(count, stacklevel=4)
        else:
            raise RuntimeError(
                f"emulate_devices: {count} CPU devices are needed, but jax has already started "
                f"with {have}; call wsekern.emulate_devices({count}) before the first array or "
                f"jax.devices(), or start with XLA_FLAGS={FLAG}={count} NPROC={2 * count} set"
            ) from None


def prepare_devices(
    count: int, platform: Platform | None = None, *, needed_by: str = "the grid"
) -> None:
    """Chooses jax's platform and, on a CPU, emulates the devices; call it before jax starts.

    For "cpu" it sets `JAX_PLATFORMS=cpu`. For the others it only removes that setting, since jax
    prefers TPUs and GPUs to the CPU by itself.

    Args:
      count: how many devices are needed.
      platform: the kind of device; None leaves the choice to `JAX_PLATFORMS` and to jax.
      needed_by: what needs them, for the error message, such as "wafer='2x4'".

    Raises:
      ValueError: more than 1024 CPU devices would have to be emulated.
      RuntimeError: jax's backend has already started with fewer CPU devices.
    """
    keep_libtpu_quiet()
    if platform == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # which read the variable when it was imported
            import jax

            jax.config.update("jax_platforms", "cpu")
    elif platform is not None and os.environ.get("JAX_PLATFORMS") == "cpu":
        del os.environ["JAX_PLATFORMS"]
    allowed = platform or os.environ.get("JAX_PLATFORMS") or "cpu"
    # A single device needs no emulation, nor the limit on threads that comes with it.
    if count == 1 or "cpu" not in allowed.split(","):
        return
    if count > MOST_EMULATED:
        raise ValueError(
            f"{needed_by} needs {count} devices, but no more than {MOST_EMULATED} can be emulated; "
            "choose a smaller grid, or --virtual for PEs that share one device"
        )
    emulate_devices(count)


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk from run to run: compiling is most of a short run.

    They stand in ~/.cache/wsekern/jax, or below $XDG_CACHE_HOME. Where JAX_COMPILATION_CACHE_DIR
    names another folder, that one is used.
    """
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "wsekern", "jax"))


def find_devices(platform: Platform | None = None) -> list[jax.Device]:
    """All devices of a platform, or of the one that jax chose; starts jax's backend.

    Raises:
      ValueError: there is no device of that platform, or jax has already started on another one.
    """
    import jax

    try:
        devices = jax.devices(platform)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"platform={platform!r} cannot be used here ({error}); choose another --platform, or "
            "install the jax of that kind of device"
        ) from None
    started = jax.devices()[0].platform
    if devices[0].platform != started:
        raise ValueError(
            f"platform={platform!r}: jax has already started, on {started}; choose the platform "
            f"before jax is used, or set JAX_PLATFORMS={platform}"
        )
    return devices


def make_wafer(wafer: str, platform: Platform | None = None, *, virtual: bool = False) -> Wafer:
    """The wafer that the flags `--wafer`, `--platform` and `--virtual` name.

    Args:
      wafer: the grid, as for `parse_grid`.
      platform: the kind of device; None: what jax prefers.
      virtual: all PEs on one device, as those of a WSE-3, instead of one PE a device.

    Raises:
      ValueError: the text is not a grid, there is no device of that platform, or there are fewer
        devices than PEs.
    """
    from wsekern.wafer.wafer import Wafer

    wafers, height, width = parse_grid(wafer)
    devices = find_devices(platform)
    if virtual:
        return Wafer.virtual(WSE3, height, width, wafers)
    count = wafers * height * width
    if count > len(devices):
        raise ValueError(
            f"wafer={wafer!r} needs {count} devices, there are {len(devices)} of kind "
            f"{devices[0].device_kind!r}; choose a smaller --wafer, or --platform cpu to emulate "
            "them, or --virtual for PEs that share one device"
        )
    return Wafer.devices(height, width, wafers)


def make_topology(target: str, grid: str | None = None) -> Wafer:
    """The wafer that the flag `--target` names, on the grid of `--wafer` if one is given.

    Args:
      target: a topology, as for `Wafer.topology`.
      grid: as for `parse_grid`; None: the topology's own.

    Raises:
      ValueError: the topology is unknown, the text is not a grid, or the grid does not fit.
      ImportError: the compiler of these chips is not installed.
    """
    from wsekern.wafer.wafer import Wafer

    if grid is None:
        return Wafer.topology(target)
    wafers, height, width = parse_grid(grid)
    return Wafer.topology(target, height, width, wafers)


def parse_height_width(text: str) -> tuple[int, int]:
    """`"2x4"` as (height, width) = (2, 4), where a program runs on one wafer only.

    Raises:
      ValueError: the text is not two positive integers with an x between them.
    """
    sizes = _parse_sizes(text)
    if sizes is None or len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"grid {text!r} is not HEIGHTxWIDTH, as in 2x4, both 1 or more")
    height, width = sizes
    return height, width


def parse_grid(text: str) -> tuple[int, int, int]:
    """`"2x4"` as (wafers, height, width) = (1, 2, 4), and `"3x2x4"` as (3, 2, 4).

    Raises:
      ValueError: the text is not two or three positive integers with an x between them.
    """
    sizes = _parse_sizes(text)
    if sizes is None or len(sizes) not in (2, 3):
        raise ValueError(
            f"wafer={text!r} is not a grid; write HEIGHTxWIDTH or WAFERSxHEIGHTxWIDTH, such as 2x4"
        )
    if min(sizes) < 1:
        raise ValueError(f"wafer={text!r} has a side of 0; every side must be 1 or more")
    wafers, height, width = sizes if len(sizes) == 3 else (1, *sizes)
    return wafers, height, width


def _parse_sizes(text: str) -> list[int] | None:
    parts = [part.strip() for part in text.lower().split("x")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return [int(part) for part in parts]
