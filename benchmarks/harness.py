"""Time candidates against one another, and show the results.

On a shared machine a time alone means little; the ratio of two times taken within the same second
means more. So candidates run in turn, round after round, in one process. A candidate's ratio to the
baseline is taken in each round, and the median over the rounds is reported.

A benchmark is a module with `main(argv)`. It parses its options, calls `start`, and only then
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
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from wsekern.moved import moved_names
from wsekern.wafer.launch import prepare_devices

if not TYPE_CHECKING:  # a type checker would take every name for one of this module
    __getattr__ = moved_names(__name__)

_PIPED_WIDTH = 160
_SAMPLE_SECONDS = 0.02  # one sample is as many calls as fit into this time


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """A compiled program with its operands; `compare` reports its compile time and memory."""

    run: Callable[[], Any]
    compile_seconds: float
    temp_bytes: int | None  # per device; None where the backend does not say
    text: Callable[[], str | None] | None = None  # gives the scheduled HLO; None: it was not kept

    def __call__(self) -> Any:
        return self.run()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The times of one candidate."""

    name: str
    seconds: float  # of one call, median
    ratio: float  # its time over the baseline's, median over the rounds
    low: float  # the first quartile of these ratios
    high: float  # the third
    compile_seconds: float | None = None
    temp_bytes: int | None = None  # temporaries per device
    note: str = ""


def start(devices: int) -> None:
    """Makes jax run on `devices` emulated CPU devices; call it before jax starts.

    `JAX_PLATFORMS` in the environment, such as `cuda`, chooses another platform. The disk cache of
    compiled programs is off, so that compile times are true.

    Raises:
      RuntimeError: jax's backend has already started with fewer devices.
    """
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    prepare_devices(devices, None if os.environ.get("JAX_PLATFORMS") else "cpu")


def compile_program(function: Callable, *operands: Any, **options: Any) -> CompiledProgram:
    """`jax.jit(function, **options)`, compiled for `operands` and ready to run on them."""
    import jax

    begun = time.perf_counter()
    program = jax.jit(function, **options).lower(*operands).compile()
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    return CompiledProgram(
        run=lambda: program(*operands),
        compile_seconds=seconds,
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
        text=program.as_text,
    )


def compile_in_place(step: Callable, state: Any, *operands: Any) -> CompiledProgram:
    """`step(state, *operands)` compiled: each call goes on from the state that the last one left.

    Args:
      step: returns the next state first, then what a call returns.
      state: where the first call begins; its memory is taken.
      operands: the same in every call.
    """
    import jax

    begun = time.perf_counter()
    program = jax.jit(step, donate_argnums=0).lower(state, *operands).compile()
    seconds = time.perf_counter() - begun
    cell = [state]

    def run() -> Any:
        cell[0], result = program(cell[0], *operands)
        return result

    memory = program.memory_analysis()
    return CompiledProgram(
        run=run,
        compile_seconds=seconds,
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
        text=program.as_text,
    )


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    baseline: str,
    *,
    rounds: int = 11,
    notes: Mapping[str, str] | None = None,
    queued: bool = False,
) -> list[Timing]:
    """The time of each candidate and its ratio to the baseline's, in the order given.

    In every round each candidate runs once, for about 20 ms or one call, whichever is longer. Every
    other round runs backwards, so that no candidate always follows the same one.

    Args:
      candidates: functions to call; the jax arrays that they return are waited for.
      baseline: name of the candidate whose time the others' are divided by.
      rounds: how often each candidate is timed.
      notes: remarks on candidates, by name.
      queued: wait for the last call of a sample, not for each: an accelerator then has its next
        call while it works, as in a real program. CPU devices would run calls beside one another.

    Raises:
      ValueError: `baseline` is not a candidate, or `rounds` is not positive.
    """
    if baseline not in candidates:
        raise ValueError(
            f"compare: baseline={baseline!r} is not a candidate; they are {list(candidates)}"
        )
    if rounds < 1:
        raise ValueError(f"compare: rounds is {rounds}, it must be 1 or more")
    calls = {name: _calls_in_a_sample(run, queued) for name, run in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds):
        order = list(candidates)[:: -1 if round_ % 2 else 1]
        for name in order:
            times[name].append(_sample(candidates[name], calls[name], queued))
    return [
        _timing(name, run, times[name], times[baseline], (notes or {}).get(name, ""))
        for name, run in candidates.items()
    ]


def show(
    title: str,
    results: Sequence[Timing],
    columns: Mapping[str, Callable[[Timing], str]] | None = None,
) -> None:
    """Prints `results` as a table, in Markdown if output is piped.

    Args:
      title: printed above the table.
      results: one for each row.
      columns: further columns: heading -> function from a result to its cell.
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
    """The machine, cores, devices, versions and date. Starts jax's backend."""
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
    """Prints `environment()` on one line."""
    console().print(", ".join(f"{k} {v}" for k, v in environment().items()), highlight=False)


def dump(
    path: pathlib.Path, tables: Mapping[str, Sequence[Timing]], extra: Mapping | None = None
) -> None:
    """Writes tables of results, and the environment, to `path` as JSON.

    Args:
      path: the file to write.
      tables: title of a table -> its results.
      extra: further entries, such as the options of the run; any JSON values.
    """
    content = {
        "environment": environment(),
        **(extra or {}),
        "tables": {t: [dataclasses.asdict(r) for r in results] for t, results in tables.items()},
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def console() -> Console:
    """The console that tables are printed to: as wide as the terminal, or 160 columns if piped."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_PIPED_WIDTH)


def _calls_in_a_sample(run: Callable[[], Any], queued: bool) -> int:
    """Warms `run` up; returns how many calls of it make one sample."""
    _sample(run, 1, queued)
    return max(1, round(_SAMPLE_SECONDS / max(_sample(run, 1, queued), 1e-7)))


def _sample(run: Callable[[], Any], calls: int, queued: bool) -> float:
    import jax

    begun = time.perf_counter()
    for _ in range(calls):
        result = run()
        if not queued:
            jax.block_until_ready(result)
    jax.block_until_ready(result)
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
