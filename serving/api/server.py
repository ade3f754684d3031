"""Run the HTTP interface: bind, serve, drain when told to end."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn

from serving.api.connections import MOST_HEADER_BYTES, make_protocol
from serving.api.door import Door
from serving.api.logs import log
from wsekern.error_line import error_line
from wsekern.interrupts import INTERRUPTED

ENGINE_FAILED = 1  # exit status
_PATIENCE = 5.0  # seconds more than the grace until what still runs is dropped
_WATCH = 0.5  # seconds between two looks at the engines


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An application behind a socket that listens from the beginning.

    Args:
      app: what `build_app` returns.
      host: where to listen; an address, or a name.
      port: 0 takes a free one.

    Raises:
      OSError: the address is taken, or not this machine's.
    """

    def __init__(self, app: Door, *, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.app = app
        settings = app.interface.settings
        self._socket = _listen(host, port)
        self.host, self.port = host, self._socket.getsockname()[1]
        self._server = _Server(
            uvicorn.Config(
                app,
                http=make_protocol(settings),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=MOST_HEADER_BYTES,
                timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]
                timeout_graceful_shutdown=settings.drain_seconds + _PATIENCE,  # type: ignore[arg-type]
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Where the server is reached."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._server.server_state.connections)

    def run(self, load: Callable[[], None] | None = None) -> int:
        """Serves until SIGTERM or Ctrl-C; call it in the main thread.

        The first signal stops new requests; those that run may go on for the grace period. A second
        signal ends the process at once.

        Args:
          load: called in another thread when the server listens; it loads the models.

        Returns:
          The exit status: 0 after SIGTERM, 130 after Ctrl-C, 1 after an engine has failed. No
          engine works again, so a supervisor must start another process.

        Raises:
          Exception: what `load` raises; the server ends then.
        """
        return asyncio.run(self._run(load))

    def start(self) -> None:
        """Serves in a thread; returns when requests are taken."""
        ready = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._loop.call_soon(ready.set)
            await self._serve()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="http")
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """Drains and ends what `start` began."""
        if self._loop is None or self._thread is None:
            raise RuntimeError("the server is not running; call start first")
        self._loop.call_soon_threadsafe(self._drain)
        self._thread.join()

    async def _run(self, load: Callable[[], None] | None) -> int:
        status = 0
        loop = self._loop = asyncio.get_running_loop()

        def end(number: int) -> None:
            nonlocal status
            status = INTERRUPTED if number == signal.SIGINT else 0
            if self.app.interface.is_draining:
                os._exit(128 + number)
            log("ending", signal=signal.Signals(number).name)
            self._drain()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)
        loading = _Loading(load, loop, self._drain)
        watching = asyncio.create_task(self._watch())
        is_closed = await self._serve()
        if loading.error is not None:
            raise loading.error
        if watching.done():
            status = ENGINE_FAILED
        # No thread can be stopped in the middle of a compilation.
        if not (loading.is_done and is_closed):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    async def _watch(self) -> None:
        """Drains, and returns, when an engine has failed."""
        while True:
            for name, served in self.app.interface.models.loaded.items():
                if (error := served.engine.failure) is not None:
                    text = f"{type(error).__name__}: {error_line(str(error))}"
                    log("engine failed, ending", level=logging.ERROR, model=name, error=text)
                    self._drain()
                    return
            await asyncio.sleep(_WATCH)

    async def _serve(self) -> bool:
        """Whether no model is being loaded any more."""
        await self._server.serve([self._socket])
        interface = self.app.interface
        is_closed = await asyncio.to_thread(interface.models.close, _PATIENCE)
        log("ended")
        return is_closed

    def _drain(self) -> None:
        """Takes no more requests; what runs may go on for the grace period."""
        interface = self.app.interface
        if not interface.is_draining:
            interface.drain()
            self._server.should_exit = True
            if self._loop is not None:
                self._loop.call_later(interface.settings.drain_seconds, interface.cancel_all)


class _Loading:
    """A thread that loads the models."""

    def __init__(
        self,
        load: Callable[[], None] | None,
        loop: asyncio.AbstractEventLoop,
        fail: Callable[[], None],
    ) -> None:
        self.error: Exception | None = None
        self.is_done = load is None
        self._load, self._loop, self._fail = load, loop, fail
        if load is not None:
            threading.Thread(target=self._run, name="load", daemon=True).start()

    def _run(self) -> None:
        assert self._load is not None
        try:
            self._load()
        except Exception as error:
            self.error = error
            self._loop.call_soon_threadsafe(self._fail)
        finally:
            self.is_done = True


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError says which address it cannot have."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        error.filename = f"{host}:{port}"
        raise
