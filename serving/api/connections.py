"""Cut connections whose clients send or read too slowly, or send too many headers.

uvicorn waits for ever for the rest of a header or a body, and for a client that does not read what
it is sent. Half a header costs nothing to send, so a few hundred of them would keep everyone out.
"""

import asyncio
import http
import socket
import sys
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.api.errors import ApiError
from serving.api.settings import Settings

MOST_HEADERS = 100
MOST_HEADER_BYTES = 32 << 10
_MOST_AHEAD = 64 << 10  # bytes of the next requests, before a request is answered
_LINGER = 5.0  # seconds in which a client may go on to send what nobody reads


def make_protocol(settings: Settings) -> type[H11Protocol]:
    """The protocol of each connection, for uvicorn."""
    return type("Connection", (Connection,), {"settings": settings})


class Connection(H11Protocol):
    """One connection, and the timers that may cut it."""

    settings = Settings()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._late: asyncio.TimerHandle | None = None  # the sender's
        self._stuck: asyncio.TimerHandle | None = None  # the reader's
        self._begun = 0.0  # when the body began
        self._bytes = 0  # of the body so far

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Without it, the second part of an answer waits 40 ms for the client to confirm the first.
        # asyncio sets it only on sockets that were made with their protocol's number.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.settings.most_connections:
            self._refuse(ApiError(503, "too many connections are open; try again later"))
            return
        self._expect(self.settings.header_time)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self._wait_for_reader(False)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        before = self.conn.their_state
        if before is h11.IDLE and self._late is None:  # the next request of a connection
            self._expect(self.settings.header_time)
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            if before is not h11.SEND_BODY:
                self._begun, self._bytes = time.monotonic(), 0
            self._bytes += len(data)
            self._expect_body()
        elif state is not h11.IDLE or not self.conn.trailing_data[0]:
            self._expect(None)
        if state is h11.DONE and self.flow.read_paused:
            # The next request has come before the answer to this one. uvicorn stops reading then,
            # and would not see that the client leaves.
            if len(self.conn.trailing_data[0]) > _MOST_AHEAD:
                self._close()
            else:
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            # A client reads an answer such as 413 when it has sent all, so it may go on for
            # a while; what it sends is dropped.
            self.loop.call_later(_LINGER, self._close_if_sending, self.cycle)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(True)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._wait_for_reader(False)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._wait_for_reader(True)  # it may not have read the last answer

    def send_400_response(self, msg: str) -> None:
        hint = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if hint == 431:
            msg = f"the headers are larger than {MOST_HEADER_BYTES:,} bytes"
        self._refuse(ApiError(hint, msg, "malformed_request"))

    def _expect_body(self) -> None:
        allowed = self.settings.body_time + self._bytes / self.settings.body_rate
        self._expect(max(0.0, self._begun + allowed - time.monotonic()))

    def _expect(self, seconds: float | None) -> None:
        """Cuts the connection unless the sender is done within some seconds; None: it is."""
        if self._late is not None:
            self._late.cancel()
        self._late = None if seconds is None else self.loop.call_later(seconds, self._cut)

    def _wait_for_reader(self, waits: bool) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
        self._stuck = (
            self.loop.call_later(self.settings.send_time, self.transport.abort) if waits else None
        )

    def _cut(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._close()  # there is no request to answer
        else:
            self._refuse(ApiError(408, "the request came too slowly", "request_timeout"))

    def _close_if_sending(self, cycle: object) -> None:
        if self.cycle is cycle and self.conn.their_state is h11.SEND_BODY:
            self._close()

    def _refuse(self, error: ApiError) -> None:
        """Answers without the application, if nothing has been answered, and closes."""
        idle = self.cycle is None or self.cycle.response_complete
        if not self.transport.is_closing() and (idle or not self.cycle.response_started):
            body = error.body("")
            head = (
                f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
                "content-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._wait_for_reader(True)
