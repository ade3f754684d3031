"""A server that a soak starts, and ends."""

import asyncio
import contextlib
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

_ENDING = 60.0  # seconds


class StartedServer:
    """A server in a process of its own.

    Args:
      url: where it listens.
      process: that it runs in.
    """

    def __init__(self, url: str, process: asyncio.subprocess.Process) -> None:
        self.url, self.pid = url, process.pid
        self._process = process

    async def end(self) -> tuple[bool, str]:
        """Tells it to end; whether it does so with status 0, and what it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(_ENDING):
                status = await self._process.wait()
        except TimeoutError:
            return False, f"it runs on, {_ENDING:g} s after SIGTERM"
        return status == 0, f"status {status} after SIGTERM"


@contextlib.asynccontextmanager
async def start_server(
    argv: Sequence[str], log: pathlib.Path | None
) -> AsyncIterator[StartedServer]:
    """A server that is ready; it is killed at the end of the block, if it runs still.

    Args:
      argv: the arguments of `python -m serving`.
      log: where its log goes; None: nowhere.

    Raises:
      ValueError: it ended before it was ready.
      OSError: the log cannot be written.
    """
    command = [sys.executable, "-m", "serving", *argv, "--port", "0"]
    with open(log or os.devnull, "wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=subprocess.PIPE,
            stderr=file,
            start_new_session=True,  # Ctrl-C in the terminal is the soak's alone
        )
    assert process.stdout is not None
    rest: asyncio.Task[bytes] | None = None
    try:
        async for line in process.stdout:
            if line.startswith(b"ready: "):
                break
        else:
            status = await process.wait()
            raise ValueError(
                f"the server ended with status {status} before it was ready; --log FILE keeps why, "
                f"as does python {shlex.join(command[1:])}"
            )
        rest = asyncio.create_task(process.stdout.read())  # lest the pipe fills
        yield StartedServer(line.split()[-1].decode().removesuffix("/v1"), process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        if rest is not None:
            await rest
