"""Run a soak: the load, a line a minute, the verdict."""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from serving.commands.http_client import HttpClient, Refused
from serving.commands.soak.arguments import SoakCommand
from serving.commands.soak.kinds import Asker
from serving.commands.soak.load import Load
from serving.commands.soak.process import Holdings, look_at
from serving.commands.soak.server import StartedServer, start_server
from serving.commands.soak.verdict import (
    Check,
    Sample,
    check_answers,
    check_files,
    check_held,
    check_memory,
)
from wsekern.estimator.pictures import output
from wsekern.interrupts import INTERRUPTED

_MOST_SAMPLES = 2000  # of a run; at most two a second
_LINES = 60.0  # seconds between two lines
_IDLE = 60.0  # seconds in which a server must come to rest
_LAST_ANSWERS = 60.0  # seconds for those that run when the time is over
_MOST_FAILURES = 20  # kinds that are printed


def run(command: SoakCommand, restore_interrupt: Callable[[], None]) -> int:
    """Soaks and reports; returns 0 if the server stayed as it was, 1 if not, 130 after Ctrl-C.

    Args:
      command: what to do.
      restore_interrupt: lets asyncio see Ctrl-C, which ends the load early.

    Raises:
      ValueError: the server does not start, or is none of `python -m serving`.
      OSError: there is no server, or no such process.
    """
    restore_interrupt()
    soak = Soak(command)
    asyncio.run(soak.run())
    for check in soak.checks:
        print(f"{'ok  ' if check.is_good else 'BAD '} {check.name}: {check.found}")
    failures = soak.failures
    for failure, count in list(failures.items())[:_MOST_FAILURES]:
        print(f"     {count:,} x {failure}")
    is_good = all(check.is_good for check in soak.checks)
    if command.json is not None:
        soak.write(command.json, is_good)
    if soak.is_interrupted:
        print("interrupted before the time was over")
        return INTERRUPTED
    print("the server stayed as it was" if is_good else "the server did not stay as it was")
    return 0 if is_good else 1


class Soak:
    """One run, and what it finds."""

    def __init__(self, command: SoakCommand) -> None:
        self._command = command
        self._samples: list[Sample] = []
        self._load: Load | None = None
        self.checks: list[Check] = []
        self.is_interrupted = False

    @property
    def failures(self) -> Mapping[str, int]:
        """How many requests failed, by what went wrong; the most frequent first."""
        return {} if self._load is None else dict(self._load.failures.most_common())

    async def run(self) -> None:
        """Fills `checks`; raises as the function `run`."""
        async with self._server() as server:
            client = HttpClient(server.url, self._command.api_key)
            try:
                asker = Asker(*await _find_model(client, self._command.name))
                await self._soak(client, server.pid, asker)
            except ProcessLookupError as error:
                self.checks.append(Check(name="process", is_good=False, found=str(error)))
            finally:
                client.close()
            if isinstance(server, StartedServer):
                is_good, found = await server.end()
                self.checks.append(Check(name="end", is_good=is_good, found=found))

    @contextlib.asynccontextmanager
    async def _server(self) -> "AsyncIterator[StartedServer | _RunningServer]":
        command = self._command
        if command.url is not None and command.pid is not None:
            look_at(command.pid)
            yield _RunningServer(command.url, command.pid)
        else:
            argv = command.server_argv
            async with start_server(argv, command.log) as server:
                yield server

    async def _soak(self, client: HttpClient, pid: int, asker: Asker) -> None:
        """Raises ProcessLookupError if the server's process ends."""
        self._load = load = Load(client, asker, self._command.requests)
        await load.send_each(self._command.seed)
        before, _ = await _rest(client, pid)
        print(f"{asker.model} at {client.url}, {self._length()}", flush=True)
        await self._send(load, pid)
        after, engines = await _rest(client, pid, before)
        samples = self._samples
        if samples:
            self.checks.append(check_memory(samples))
            self.checks.append(check_files(before, after, samples))
        self.checks.append(check_held(engines))
        self.checks.append(check_answers(load.outcomes, load.failures))

    def _length(self) -> str:
        command = self._command
        requests = "" if command.requests is None else f"{command.requests:,} requests in at most "
        return f"{requests}{command.minutes:g} minutes of {command.concurrency} clients"

    async def _send(self, load: Load, pid: int) -> None:
        """Sends from all clients until the time is over, all is sent, or Ctrl-C."""
        seconds = 60 * self._command.minutes
        end = time.monotonic() + seconds
        clients = [
            asyncio.create_task(load.send_until(end, f"{self._command.seed} {number}"))
            for number in range(self._command.concurrency)
        ]
        try:
            await self._watch(load, pid, seconds, clients)
            await asyncio.wait(clients, timeout=_LAST_ANSWERS)
        except asyncio.CancelledError:  # Ctrl-C; what follows may still take its time
            self.is_interrupted = True
        finally:
            for client in clients:
                client.cancel()
            found = await asyncio.gather(*clients, return_exceptions=True)
        for error in found:
            if isinstance(error, Exception):
                raise error

    async def _watch(
        self, load: Load, pid: int, seconds: float, clients: Sequence[asyncio.Task[None]]
    ) -> None:
        """Takes samples, and prints a line a minute, until the clients end or the time is over."""
        start = time.monotonic()
        every = max(0.5, seconds / _MOST_SAMPLES)
        next_line = _LINES
        while (now := time.monotonic() - start) < seconds:
            if all(client.done() for client in clients):
                return
            self._samples.append(Sample(time=now, holdings=look_at(pid), requests=load.requests))
            if now >= next_line:
                print(_line(self._samples, sum(load.failures.values())), flush=True)
                next_line += _LINES
            await asyncio.wait(clients, timeout=min(every, max(0.0, seconds - now)))

    def write(self, path: pathlib.Path, is_good: bool) -> None:
        """Writes the verdict, the counts and the samples as JSON; OSError: it cannot."""
        outcomes: dict[str, dict[str, int]] = {}
        if self._load is not None:
            for (kind, outcome), count in self._load.outcomes.items():
                outcomes.setdefault(kind, {})[outcome] = count
        found: dict[str, Any] = {
            "is_good": is_good,
            "checks": [dataclasses.asdict(check) for check in self.checks],
            "outcomes": outcomes,
            "failures": self.failures,
            "samples": [dataclasses.asdict(sample) for sample in self._samples],
        }
        output.write(path, json.dumps(found, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class _RunningServer:
    url: str
    pid: int


async def _find_model(client: HttpClient, name: str | None) -> tuple[str, int]:
    """The model's name, and the tokens of its context."""
    try:
        await client.get("/slots?format=full")
        listed = (await client.get("/public/v1/models"))["data"]
        contexts = {one["id"]: one["limits"]["max_context_length"] for one in listed}
    except (Refused, KeyError, TypeError) as error:
        raise ValueError(f"{client.url} is no server of `python -m serving`: {error}") from error
    if not contexts or (name is not None and name not in contexts):
        raise ValueError(f"name={name!r} is none of the server's models: {', '.join(contexts)}")
    name = name or next(iter(contexts))
    return name, contexts[name]


async def _rest(
    client: HttpClient, pid: int, before: Holdings | None = None
) -> tuple[Holdings, Sequence[Mapping[str, Any]]]:
    """Waits until the server is idle; what it and its engines hold then, or after a minute.

    Args:
      client: its connections are closed, but for one.
      pid: of the server.
      before: what it held before the load; None: that does not matter.
    """
    client.close()
    end = time.monotonic() + _IDLE
    while True:
        holdings = look_at(pid)
        engines = (await client.get("/slots?format=full"))["models"]
        is_idle = check_held(engines).is_good
        is_idle &= before is None or check_files(before, holdings).is_good
        if is_idle or time.monotonic() > end:
            return holdings, engines
        await asyncio.sleep(0.5)


def _line(samples: Sequence[Sample], failed: int) -> str:
    newest = samples[-1]
    earlier = next(one for one in samples if one.time >= newest.time - _LINES - 1)
    rate = (newest.requests - earlier.requests) / max(1e-9, newest.time - earlier.time)
    held = newest.holdings
    return (
        f"minute {newest.time / 60:.0f}: {newest.requests:,} requests, {rate:.1f} a second, "
        f"{failed} failed; {held.memory / 1e6:,.1f} MB, {held.files} files, "
        f"{held.threads} threads, {held.processes} processes"
    )
