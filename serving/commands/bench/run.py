"""Run a bench: levels one after the other, then the report; Ctrl-C reports what there is."""

import asyncio
import contextlib
import dataclasses
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence

from rich.console import Console

from serving.commands.bench.arguments import BenchCommand
from serving.commands.bench.figures import LevelFigures, Timing, summarize
from serving.commands.bench.load import Load
from serving.commands.bench.report import make_notes, make_rows, make_table, write_json, write_plot
from serving.commands.http_client import HttpClient
from wsekern.interrupts import INTERRUPTED

_EVERY = 1.0  # seconds between two lines of progress

Levels = list[tuple[int, list[Timing]]]


def run(command: BenchCommand, restore_interrupt: Callable[[], None]) -> int:
    """Measures and reports; returns 0, 1 if every request failed, or 130 after Ctrl-C.

    Args:
      command: what to measure.
      restore_interrupt: lets asyncio see Ctrl-C.

    Raises:
      Refused: the server refuses a plain request.
      OSError: it is not there; or a file cannot be written.
      ValueError: it lists no model.
    """
    restore_interrupt()
    client = HttpClient(command.url, command.api_key)
    load = Load(command, client)
    levels: Levels = []
    is_whole = asyncio.run(_measure(command, client, load, levels))
    found = [(summarize(concurrency, timings), timings) for concurrency, timings in levels]
    found = [(figures, timings) for figures, timings in found if timings]
    if not is_whole:
        print("interrupted; so far:" if found else "interrupted", file=sys.stderr)
    if found:
        _report(command, load, found)
    if not is_whole:
        return INTERRUPTED
    return 0 if any(figures.tokens for figures, _ in found) else 1


async def _measure(command: BenchCommand, client: HttpClient, load: Load, levels: Levels) -> bool:
    """Fills `levels`; False: Ctrl-C came, for which asyncio cancels this task."""
    try:
        await load.prepare()
        for concurrency in command.levels:
            timings: list[Timing] = []
            levels.append((concurrency, timings))
            async with _progress(command, concurrency, timings):
                await load.run(concurrency, timings)
        return True
    except asyncio.CancelledError:
        return False
    finally:
        client.close()


@contextlib.asynccontextmanager
async def _progress(
    command: BenchCommand, concurrency: int, timings: Sequence[Timing]
) -> AsyncIterator[None]:
    """On a terminal, one line says how far the level is."""

    async def tell() -> None:
        start = time.monotonic()
        while True:
            await asyncio.sleep(_EVERY)
            tokens = sum(timing.tokens for timing in timings)
            said = f"concurrency {concurrency}: {len(timings)} of {command.requests} requests, "
            said += f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
            print(f"\r{said:<78}", end="", file=sys.stderr, flush=True)

    if not sys.stderr.isatty():
        yield
        return
    teller = asyncio.create_task(tell())
    try:
        yield
    finally:
        teller.cancel()
        print(f"\r{'':78}\r", end="", file=sys.stderr, flush=True)


def _report(
    command: BenchCommand, load: Load, found: Sequence[tuple[LevelFigures, Sequence[Timing]]]
) -> None:
    levels = [figures for figures, _ in found]
    title = f"{load.model} at {command.url}"
    if command.rate is not None:
        title += f", {command.rate:g} requests a second"
    notes = make_notes(levels, load.notes)
    Console(highlight=False).print(make_table(make_rows(levels), title))
    for note in notes:
        print(note)
    head = {"model": load.model, "notes": notes, "command": _shown(command) | {"seed": load.seed}}
    if command.json is not None:
        write_json(command.json, head, found)
    if command.plot is not None:
        write_plot(command.plot, levels, title, notes)


def _shown(command: BenchCommand) -> dict[str, object]:
    """The arguments for JSON, without the key."""
    values = dataclasses.asdict(command) | {"fields": command.fields}
    hidden = ("api_key", "body", "json", "plot")
    kept = {name: value for name, value in values.items() if name not in hidden}
    return kept | {"prompts": None if command.prompts is None else str(command.prompts)}
