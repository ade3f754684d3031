"""How much of this machine's memory a program takes, before it takes any.

A virtual wafer keeps the tiles of all its PEs on one device, which may be too small for them.
"""

import contextlib
import contextvars
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from wsekern.wafer.wafer import Wafer

# If operands and results take less than this share of the available memory, skip the check.
_LARGE_SHARE = 1 / 16
_SMALL_BYTES = 2**28  # below this size, skip the check
_CGROUP = pathlib.Path("/sys/fs/cgroup")
# Whether `memory` is tracing, which wants a figure and no refusal.
_asking = contextvars.ContextVar("asking", default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a program takes of one device's memory; `print` it."""

    arguments: int  # there before it runs
    results: int  # without those that reuse the memory of arguments
    temporaries: int  # at the peak
    available: int | None  # free now; None if unknown

    @property
    def total(self) -> int:
        """Arguments, results and temporaries together."""
        return self.arguments + self.results + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the total is available, as if the arguments were not allocated yet."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        parts = ("arguments", "results", "temporaries")
        details = ", ".join(f"{name} {size(getattr(self, name))}" for name in parts)
        free = "unknown" if self.available is None else size(self.available)
        return f"{size(self.total)} of {free} available ({details})"


def memory(function: Callable, *operands: Any, wafer: "Wafer | None" = None) -> Memory:
    """The memory that `function(*operands)` takes on this machine; it is compiled, but not run.

    Args:
      function: any jax function.
      operands: arrays or `jax.ShapeDtypeStruct`s, or pytrees of them. Nothing is allocated.
      wafer: the current wafer inside `function`; by default the one in force.

    Raises:
      ValueError: the wafer is abstract, which never runs; or the backend gives no figures.
    """
    if wafer is not None and wafer.backend == "abstract":
        raise ValueError(
            f"memory: {wafer!r} never runs; wk.estimate says what a PE of it holds (sram_per_pe)"
        )
    token = _asking.set(True)
    try:
        with wafer or contextlib.nullcontext():
            program = jax.jit(lambda *operands: function(*operands)).lower(*operands).compile()
    finally:
        _asking.reset(token)
    analysis = program.memory_analysis()
    if analysis is None:
        raise ValueError(f"memory: {jax.default_backend()} does not say what programs take")
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        results=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        available=available(),
    )


def available() -> int | None:
    """Bytes that the first device still has for arrays; None if unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    limits = [*_machine_bytes(), *_container_bytes()]
    return min(limits) if limits else None


def bytes_needed(program: Any, operands: tuple, results: Any, devices: int = 1) -> int:
    """Bytes that a jitted program needs beside its operands; 0 if they are too few to matter.

    Args:
      program: the result of `jax.jit`.
      operands: its operands.
      results: their shapes.
      devices: how many devices run it, each on its part, in this one memory.
    """
    least = bytes_of(operands) + bytes_of(results)
    room = available()
    if room is None or least < _LARGE_SHARE * room:
        return 0
    if bytes_of(results) > room:
        return bytes_of(results)  # no need to compile it
    # The compiled program is kept for the call itself.
    analysis = program.lower(*operands).compile().memory_analysis()
    if analysis is None:
        return bytes_of(results)
    results_bytes = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return devices * (results_bytes + analysis.temp_size_in_bytes)


def check_room(wafer: "Wafer", needed: int, operands: Any) -> None:
    """Raises ValueError if a program needs more, beside its operands, than is available."""
    room = available()
    if room is not None and needed > room:
        raise ValueError(_no_room(wafer, f"{size(needed)} beside its operands' ", operands, room))


def check_traced(wafer: "Wafer", operands: Any, results: Any) -> None:
    """Raises ValueError if operands and results alone, not allocated yet, are too large."""
    needed = bytes_of(operands) + bytes_of(results)
    if needed < _SMALL_BYTES or _asking.get():
        return
    room = available()
    if room is not None and needed > room:
        least = f"at least {size(needed)}, of which its operands are "
        raise ValueError(_no_room(wafer, least, operands, room))


def _no_room(wafer: "Wafer", needs: str, operands: Any, room: int) -> str:
    return (
        f"Wafer.map: a program of {wafer.height}x{wafer.width} virtual PEs needs {needs}"
        f"{size(bytes_of(operands))}, and this machine has {size(room)} available; take fewer PEs "
        "or smaller tiles (wk.memory tells beforehand; to trace only, take Wafer.abstract)"
    )


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays, or of their shapes, in a pytree."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def size(count: int) -> str:
    """A number of bytes in a readable unit: "1.5 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _bytes(leaf: Any) -> int:
    if not hasattr(leaf, "dtype"):
        return 8
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 4)


def _machine_bytes() -> Iterator[int]:
    info = pathlib.Path("/proc/meminfo")
    for line in _lines(info):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _container_bytes() -> Iterator[int]:
    """What a container's limit leaves, for version 2 and for version 1 of cgroups."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        pair = [next(iter(_lines(_CGROUP / name)), "") for name in (most, used)]
        if all(text.strip().isdigit() for text in pair):
            # The cache of files counts as used, but is given up as soon as arrays need the memory.
            cached = [
                int(line.split()[1])
                for line in _lines((_CGROUP / most).with_name("memory.stat"))
                if line.split()[0] in ("inactive_file", "total_inactive_file")
            ]
            yield int(pair[0]) - int(pair[1]) + max(cached, default=0)


def _lines(path: pathlib.Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
