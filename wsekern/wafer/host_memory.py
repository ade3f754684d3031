"""This file is what a program takes of this machine's memory, told before any of it is taken.

A virtual wafer keeps the tiles of all its PEs on one device, which may well be too small for them.
"""

from __future__ import annotations

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

# Of what is available: a program whose operands and results alone take less is not looked into.
_LARGE = 1 / 16
_SMALL = 2**28  # bytes of which nobody asks whether they are there
_CGROUP = pathlib.Path("/sys/fs/cgroup")
_asked = contextvars.ContextVar("asked", default=False)  # whether a figure is wanted, not a refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device that a program takes; `print` it."""

    arguments: int  # there before it runs
    results: int  # those that do not take the memory of arguments
    temporaries: int  # at most at any time
    available: int | None  # now, for what is not there yet; None where it is not known

    @property
    def total(self) -> int:
        """All of it."""
        return self.arguments + self.results + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether all of it is available; arguments are counted as not yet there."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        parts = ("arguments", "results", "temporaries")
        told = ", ".join(f"{name} {size(getattr(self, name))}" for name in parts)
        there = "unknown" if self.available is None else size(self.available)
        return f"{size(self.total)} of {there} available ({told})"


def memory(function: Callable, *operands: Any, wafer: Wafer | None = None) -> Memory:
    """What `function(*operands)` takes of this machine's memory: compiled, but not run.

    Args:
      function: any jax function.
      operands: arrays or `jax.ShapeDtypeStruct`s; pytrees of them. Nothing is allocated for them.
      wafer: the current wafer in `function`; by default the one in force.

    Raises:
      ValueError: the wafer is abstract, which never runs.
    """
    if wafer is not None and wafer.backend == "abstract":
        raise ValueError(
            f"memory: {wafer!r} never runs; wk.estimate says what a PE of it holds (sram_per_pe)"
        )
    asked = _asked.set(True)
    try:
        with wafer or contextlib.nullcontext():
            program = jax.jit(lambda *operands: function(*operands)).lower(*operands).compile()
    finally:
        _asked.reset(asked)
    found = program.memory_analysis()
    if found is None:
        raise ValueError(f"memory: {jax.default_backend()} does not say what programs take")
    return Memory(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        available=available(),
    )


def available() -> int | None:
    """Bytes that the first device still has for arrays; None where nothing says so."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = [*_of_machine(), *_of_group()]
    return min(found) if found else None


def taken(program: Any, operands: tuple, results: Any, devices: int = 1) -> int:
    """Bytes that a jitted program needs beside its operands; 0 where they are too few to matter.

    Args:
      program: what `jax.jit` gave.
      operands: its operands.
      results: their shapes.
      devices: how many run it, each on a part, in this one memory.
    """
    least = bytes_of(operands) + bytes_of(results)
    room = available()
    if room is None or least < _LARGE * room:
        return 0
    if bytes_of(results) > room:
        return bytes_of(results)  # no need to compile it
    found = program.lower(*operands).compile().memory_analysis()  # kept for the call itself
    if found is None:
        return bytes_of(results)
    each = found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    return devices * each


def check_room(wafer: Wafer, needed: int, operands: Any) -> None:
    """Raises ValueError where a program needs more, beside its operands, than is available."""
    room = available()
    if room is not None and needed > room:
        raise ValueError(_no_room(wafer, f"{size(needed)} beside its operands' ", operands, room))


def check_traced(wafer: Wafer, operands: Any, results: Any) -> None:
    """Raises ValueError where operands and results alone, not there yet, are more than there is."""
    needed = bytes_of(operands) + bytes_of(results)
    if needed < _SMALL or _asked.get():
        return
    room = available()
    if room is not None and needed > room:
        told = f"at least {size(needed)}, of which its operands are "
        raise ValueError(_no_room(wafer, told, operands, room))


def _no_room(wafer: Wafer, told: str, operands: Any, room: int) -> str:
    return (
        f"Wafer.map: a program of {wafer.height}x{wafer.width} virtual PEs needs {told}"
        f"{size(bytes_of(operands))}, and this machine has {size(room)} available; take fewer PEs "
        "or smaller tiles (wk.memory tells beforehand; to trace only, take Wafer.abstract)"
    )


def bytes_of(tree: Any) -> int:
    """Of all arrays in a pytree, or of their shapes."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def size(count: int) -> str:
    """A number of bytes in a unit that suits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _bytes(leaf: Any) -> int:
    if not hasattr(leaf, "dtype"):
        return 8
    return math.prod(leaf.shape) * getattr(leaf.dtype, "itemsize", 4)


def _of_machine() -> Iterator[int]:
    info = pathlib.Path("/proc/meminfo")
    for line in _lines(info):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _of_group() -> Iterator[int]:
    """What a container leaves, where its limit is below the machine's."""
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        pair = [next(iter(_lines(_CGROUP / name)), "") for name in (most, used)]
        if all(text.strip().isdigit() for text in pair):
            # What files take of a group's memory is given up as soon as arrays need it.
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
