"""Send server-sent events, and end the work for a client that has gone."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Send

from serving.api.errors import ApiError, as_api_error
from serving.api.logs import log_exception

_PING = b": ping\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # or nginx would hold events back
]


class EventStream:
    """A response of server-sent events; a comment breaks a long silence.

    async with EventStream(request, send, ping=15.0) as stream:
        await stream.send_json({"id": 1})

    An error within the block becomes the last event.

    Args:
      request: that is answered.
      send: of its ASGI application.
      ping: seconds of silence after which there is a comment.
      error_event: the name and the content of an error's event.
    """

    def __init__(
        self,
        request: Request,
        send: Send,
        *,
        ping: float,
        error_event: Callable[[ApiError], tuple[str | None, Any]] | None = None,
    ) -> None:
        self._request = request
        self._send = send
        self._ping = ping
        self._error_event = error_event or self._usual_error
        self._last = time.monotonic()
        self._pinging: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "EventStream":
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self._pinging = asyncio.create_task(self._break_silence())
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if self._pinging is not None:
            self._pinging.cancel()
        if isinstance(error, Exception):
            failure = as_api_error(error)
            if failure.status == 500:
                log_exception(error, self._request.scope["request_id"])
            self._request.scope["answer"].fields["error"] = failure.message[:300]
            name, content = self._error_event(failure)
            await self.send_json(content, name)
        elif error is not None:  # such as that the client is gone
            return False
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        return True

    def _usual_error(self, error: ApiError) -> tuple[str | None, Any]:
        return None, error.event(self._request.scope["request_id"])

    async def send_json(self, value: Any, name: str | None = None) -> None:
        """Sends one event.

        Args:
          value: becomes JSON.
          name: of the event, if it has one.
        """
        data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
        begin = b"" if name is None else f"event: {name}\n".encode()
        await self.send_bytes(begin + b"data: " + data + b"\n\n")

    async def send_bytes(self, data: bytes) -> None:
        """Sends bytes that are whole events; waits while the client reads too slowly."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._last = time.monotonic()

    async def send_done(self) -> None:
        """Sends the mark that ends a stream."""
        await self.send_bytes(b"data: [DONE]\n\n")

    async def _break_silence(self) -> None:
        while True:
            silence = time.monotonic() - self._last
            if silence >= self._ping:
                await self.send_bytes(_PING)
                silence = 0.0
            await asyncio.sleep(self._ping - silence)


async def unless_gone(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`; it is cancelled at once when the client disconnects.

    Args:
      request: its body has been read.
      work: answers the request.

    Raises:
      ClientDisconnect: the client is gone.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_wait_until_gone(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        # After a whole answer there is nothing to receive any more, which looks like a disconnect.
        if not working.done() and not request.scope["answer"].is_complete:
            working.cancel()
        await asyncio.wait({working})
        if working.cancelled():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
