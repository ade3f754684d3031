"""This file is how candidates are timed against one another, and how the outcome is shown.

On a shared machine a time means little by itself; the ratio of two times taken within the same
second means more. So candidates run in turn, round after round, in one process, and what is
reported is the median over the rounds of each one's ratio to the baseline.

A benchmark is a module with `main(argv)`: it parses its options, calls `start`, and only then
imports jax.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from wsekern.wafer.launch import prepare_devices

_PIPED_WIDTH = 160
_SAMPLE_SECONDS = 0.02  # a sample is as many calls as take this long


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A program ready to run on its operands: `compare` calls it and reports what it knows."""

    run: Callable[[], Any]
    compile_seconds: float
    temp_bytes: int | None  # per device; None where the backend does not say

    def __call__(self) -> Any:
        return self.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """How one candidate did."""

    name: str
    seconds: float  # of one call, median
    ratio: float  # its time over the baseline's, median over the rounds
    low: float  # the first quartile of these ratios
    high: float  # the third
    compile_seconds: float | None = None
    temp_bytes: int | None = None  # temporaries per device
    note: str = ""


def start(devices: int) -> None:
    """Has jax run on as many CPU devices as `devices`; call it before jax starts.

    `JAX_PLATFORMS` in the environment, `cuda` say, chooses another platform. Compiled programs are
    not kept on disk, so that compile times are what they say.

    Raises:
      RuntimeError: jax's backend has already started with fewer devices.
    """
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    prepare_devices(devices, None if os.environ.get("JAX_PLATFORMS") else "cpu")


def compile_program(function: Callable, *operands: Any, **options: Any) -> CompiledProgram:
    """`jax.jit(function, **options)`, compiled for `operands`, to be run on them."""
    import jax

    begun = time.perf_counter()
    program = jax.jit(function, **options).lower(*operands).compile()
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    return CompiledProgram(
        run=lambda: program(*operands),
        compile_seconds=seconds,
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    baseline: str,
    *,
    rounds: int = 11,
    notes: Mapping[str, str] | None = None,
) -> list[Timing]:
    """The time of each candidate and its ratio to the baseline's, in the order given.

    In every round each candidate runs once, for about 20 ms or one call, whichever is longer; every
    other round goes backwards, so that none always follows the same one.

    Args:
      candidates: what to call; jax arrays in what it returns are waited for.
      baseline: the name of the candidate that the others are divided by.
      rounds: how often each is timed.
      notes: a remark on a candidate, by name.

    Raises:
      ValueError: `baseline` is not a candidate, or `rounds` is not positive.
    """
    if baseline not in candidates:
        raise ValueError(
            f"compare: baseline={baseline!r} is not a candidate; they are {list(candidates)}"
        )
    if rounds < 1:
        raise ValueError(f"compare: rounds is {rounds}, it must be 1 or more")
    calls = {name: _calls(run) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds):
        order = list(candidates)[:: -1 if round_ % 2 else 1]
        for name in order:
            times[name].append(_sample(candidates[name], calls[name]))
    return [
        _timing(name, run, times[name], times[baseline], (notes or {}).get(name, ""))
        for name, run in candidates.items()
    ]


def show(
    title: str,
    results: Sequence[Timing],
    columns: Mapping[str, Callable[[Timing], str]] | None = None,
) -> None:
    """Prints `results` as a table, in Markdown where output is piped.

    Args:
      title: stands above it.
      results: a row each.
      columns: further columns, by their headings.
    """
    out = console()
    table = Table(box=box.HEAVY_HEAD if out.is_terminal else box.MARKDOWN)
    table.add_column("candidate")
    table.add_column("time", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("quartiles", justify="right")
    table.add_column("temporaries", justify="right")
    table.add_column("compile", justify="right")
    for heading in columns or {}:
        table.add_column(heading, justify="right")
    table.add_column("note")
    for result in results:
        table.add_row(
            result.name,
            _duration(result.seconds),
            f"{result.ratio:.2f}",
            f"{result.low:.2f}-{result.high:.2f}",
            "" if result.temp_bytes is None else f"{result.temp_bytes / 2**20:.2f} MiB",
            "" if result.compile_seconds is None else f"{result.compile_seconds:.2f} s",
            *(cell(result) for cell in (columns or {}).values()),
            result.note,
        )
    out.print(f"\n{title}\n", highlight=False)
    out.print(table)


def environment() -> dict[str, Any]:
    """Where and when: machine, cores, devices, versions and date. Starts jax's backend."""
    import jax

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show_environment() -> None:
    """Prints `environment()` in one line."""
    console().print(", ".join(f"{k} {v}" for k, v in environment().items()), highlight=False)


def dump(
    path: pathlib.Path, tables: Mapping[str, Sequence[Timing]], extra: Mapping | None = None
) -> None:
    """Writes tables of results by title, and the environment, to `path` as JSON.

    Args:
      path: the file.
      tables: results by the title of their table.
      extra: what else to keep, such as the options of the run; any JSON values.
    """
    content = {
        "environment": environment(),
        **(extra or {}),
        "tables": {t: [dataclasses.asdict(r) for r in results] for t, results in tables.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough where output is piped."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_PIPED_WIDTH)


def _calls(run: Callable[[], Any]) -> int:
    """Warms `run` up; how many calls of it make one sample."""
    _sample(run, 1)
    return max(1, round(_SAMPLE_SECONDS / max(_sample(run, 1), 1e-7)))


def _sample(run: Callable[[], Any], calls: int) -> float:
    import jax

    begun = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - begun) / calls


def _timing(name, run, times, baseline, note):
    ratios = sorted(mine / its for mine, its in zip(times, baseline, strict=True))
    low, _, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if ratios[1:] else ratios * 3
    )
    return Timing(
        name=name,
        seconds=statistics.median(times),
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        compile_seconds=getattr(run, "compile_seconds", None),
        temp_bytes=getattr(run, "temp_bytes", None),
        note=note,
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
