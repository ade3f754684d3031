"""A small HTTP client for asyncio: JSON out, JSON or server-sent events back."""

import asyncio
import contextlib
import json
import os
import ssl
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Any

import h11

_PIECE = 64 << 10  # bytes
_MOST_IDLE = 256  # connections kept for later requests


class Refused(Exception):
    """An answer that is an error.

    Args:
      status: of the HTTP response, or of the error that ended a stream.
      message: what the server says.
      code: the server's short name for the error, if it has one.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.code = status, message, code


class HttpClient:
    """Sends requests to one server; connections are kept and used again.

        client = HttpClient("http://127.0.0.1:8000")
        answer = await client.get("/v1/models")
        async with client.post("/v1/completions", body) as response:
            async for event in response.events(): ...

    Args:
      url: of the server, with or without the "/v1" at its end.
      api_key: sent as a bearer token; None: none is.

    Raises:
      ValueError: the URL is none of HTTP.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must be like http://127.0.0.1:8000")
        self.url = url
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {
            "host": parts.netloc.rpartition("@")[2],
            "accept": "application/json, text/event-stream",
            "user-agent": "wsekern",
        }
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._idle: list[_Connection] = []

    async def get(self, path: str, *, is_json: bool = True) -> Any:
        """The JSON at a path, or its bytes.

        Args:
          path: of the route, with its query.
          is_json: whether the answer is JSON.

        Raises:
          Refused: the answer is an error.
          OSError: the server is not there, or ends the connection.
        """
        async with self._request("GET", path, b"") as response:
            return await response.json() if is_json else await response.read()

    @contextlib.asynccontextmanager
    async def post(self, path: str, body: Any) -> "AsyncIterator[Response]":
        """Sends JSON; the block reads the answer. Leaving it early closes the connection.

        Args:
          path: of the route.
          body: becomes JSON; bytes are sent as they are.

        Raises:
          OSError: the server is not there, or ends the connection.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._request("POST", path, data) as response:
            yield response

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, data: bytes) -> "AsyncIterator[Response]":
        headers = self._headers
        if data:
            headers = headers | {"content-type": "application/json"}
            headers["content-length"] = str(len(data))
        target = self._prefix + path
        kept = self._take()
        connection = kept or await self._open()
        try:
            try:
                response = await connection.send(method, target, headers, data)
            except (h11.RemoteProtocolError, OSError):
                if kept is None:
                    raise
                # The server closed it meanwhile; nothing of an answer was sent.
                kept.close()
                connection = await self._open()
                response = await connection.send(method, target, headers, data)
            yield response
        except h11.RemoteProtocolError as error:
            raise ConnectionError(f"{self.url}: {error}") from error
        finally:
            if connection.start_again() and len(self._idle) < _MOST_IDLE:
                self._idle.append(connection)
            else:
                connection.close()

    async def _open(self) -> "_Connection":
        try:
            ends = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        except OSError as error:
            # asyncio says "Connect call failed" for every reason.
            known = error.errno is not None and error.errno > 0
            reason = os.strerror(error.errno or 0) if known else error.strerror or error
            raise ConnectionError(f"no server answers at {self.url}: {reason}") from error
        return _Connection(*ends)

    def _take(self) -> "_Connection | None":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Closes the connections that are kept."""
        while self._idle:
            self._idle.pop().close()


class Response:
    """The answer to one request, as it comes."""

    def __init__(self, connection: "_Connection", head: h11.Response) -> None:
        self.status = head.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
        self.is_done = False  # whether a stream's last event was "[DONE]"
        self._connection = connection

    async def read(self) -> bytes:
        """The whole body.

        Raises:
          Refused: the answer is an error.
          OSError: the server ends the connection.
        """
        body = b"".join([piece async for piece in self._pieces()])
        if self.status < 400:
            return body
        try:
            error = json.loads(body)
        except ValueError:
            error = {"message": body[:300].decode(errors="replace")}
        raise _refusal(self.status, error)

    async def json(self) -> Any:
        """The whole body, which is JSON.

        Raises:
          Refused: the answer is an error, or no JSON.
          OSError: the server ends the connection.
        """
        body = await self.read()
        try:
            return json.loads(body)
        except ValueError:
            raise Refused(self.status, f"the answer is no JSON: {body[:100]!r}") from None

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON of a stream's events, to the end of the body.

        Raises:
          Refused: the answer is an error, or an event is one.
          OSError: the server ends the connection before the stream.
        """
        if self.status >= 400 or "event-stream" not in self.headers.get("content-type", ""):
            await self.json()
            raise Refused(self.status, "the answer is no stream of events")
        rest = b""
        async for piece in self._pieces():
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                name, _, value = line.strip().partition(b":")
                if name != b"data":
                    continue
                if value.strip() == b"[DONE]":
                    self.is_done = True
                    continue
                yield self._read_event(value)

    def _read_event(self, data: bytes) -> dict[str, Any]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise Refused(self.status, f"an event is no JSON object: {data[:100]!r}")
        if event.get("error") or event.get("type") == "error":
            raise _refusal(event.get("status_code", self.status), event)
        return event

    async def _pieces(self) -> AsyncIterator[bytes]:
        while True:
            event = await self._connection.next_event()
            if isinstance(event, h11.EndOfMessage):
                return
            if isinstance(event, h11.Data):
                yield bytes(event.data)


class _Connection:
    """One connection, which carries one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @property
    def is_open(self) -> bool:
        """Whether the server has not closed it."""
        return not self._reader.at_eof() and not self._writer.is_closing()

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], data: bytes
    ) -> Response:
        """Sends a request; returns when the head of the answer is there."""
        request = h11.Request(method=method, target=target, headers=list(headers.items()))
        sent = self._http.send(request) or b""
        if data:
            sent += self._http.send(h11.Data(data=data)) or b""
        self._writer.write(sent + (self._http.send(h11.EndOfMessage()) or b""))
        await self._writer.drain()
        while not isinstance(head := await self.next_event(), h11.Response):
            pass  # 100 Continue and its kind
        return Response(self, head)

    async def next_event(self) -> Any:
        """What comes next of the answer.

        Raises:
          h11.RemoteProtocolError: the server ends the connection, or does not speak HTTP.
        """
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_PIECE))
        if isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("the server closed the connection")
        return event

    def start_again(self) -> bool:
        """Whether the answer was read to its end, and the connection can carry another request."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return self.is_open
        return False

    def close(self) -> None:
        """Closes it at once; the server sees that the client has gone."""
        self._writer.transport.abort()


def _refusal(status: int, body: Any) -> Refused:
    """The error that a body describes: nested as OpenAI's, or flat."""
    fields = body.get("error", body) if isinstance(body, dict) else {}
    if not isinstance(fields, dict):
        fields = {"message": str(fields)}
    code = fields.get("code")
    return Refused(status, str(fields.get("message", "no message")), code and str(code))
