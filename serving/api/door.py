"""What every request meets before its route: ids, keys, limits, origins, logs and errors."""

import dataclasses
import re
import time
import urllib.parse
import uuid
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Router
from starlette.types import Message, Receive, Scope, Send

from serving.api.connections import MOST_HEADER_BYTES, MOST_HEADERS
from serving.api.errors import ApiError, as_api_error, cut
from serving.api.interface import Interface, send_bytes
from serving.api.logs import log, log_exception

_GONE = 499  # in logs and metrics: the client left before its answer
_UNCOUNTED = {"/v1/tcp_warming", "/health", "/metrics", "/slots"}
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_LOCAL = {"localhost", "127.0.0.1", "::1"}
_EXPOSED = "x-request-id, retry-after, x-should-retry"


@dataclasses.dataclass
class Answer:
    """What has been answered so far."""

    status: int = 0  # 0: nothing yet
    is_complete: bool = False
    headers: dict[str, str] = dataclasses.field(default_factory=dict)  # to add
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)  # for the log


class Door:
    """An ASGI application around the routes."""

    def __init__(self, routes: Router, interface: Interface) -> None:
        self.interface = interface
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        path = scope["path"]
        while path.startswith("/v1/v1/"):  # clients differ in whether the base URL has /v1
            path = path[3:]
        scope.update(app=self, path=path, raw_path=path.encode("utf-8", "replace"))
        scope["request_id"] = _request_id(headers)
        answer = scope["answer"] = Answer(headers={"x-request-id": scope["request_id"]})
        answer.headers |= self._allowed_origin(headers)

        async def send_all(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                more = [
                    (name.encode(), value.encode("latin-1"))
                    for name, value in answer.headers.items()
                ]
                message = {**message, "headers": [*message.get("headers", ()), *more]}
            elif not message.get("more_body", False):
                answer.is_complete = True
            await send(message)

        try:
            await self._answer(scope, receive, send_all, headers)
        except HTTPException as error:
            await self._send_error(scope, send_all, _of_routing(error, scope))
        except ClientDisconnect:
            answer.status = _GONE
        except Exception as error:
            failure = as_api_error(error)
            if failure.status == 500:
                log_exception(error, scope["request_id"])
            await self._send_error(scope, send_all, failure)
        finally:
            self._record(scope, answer, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > MOST_HEADER_BYTES or len(scope["headers"]) > MOST_HEADERS:
            raise ApiError(
                431,
                f"the request has {len(scope['headers'])} headers of {size:,} bytes; "
                f"{MOST_HEADERS} of {MOST_HEADER_BYTES:,} bytes are the most",
                "headers_too_large",
            )
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await self._send_preflight(scope, send)
            return
        origin = headers.get("origin")
        if origin and scope["method"] not in ("GET", "HEAD") and not self._is_allowed(headers):
            raise ApiError(403, f"pages of {origin} may not use this server", "origin_not_allowed")
        if scope["path"] != "/health":
            scope["owner"] = self.interface.keys.owner(headers)
        if scope["method"] == "OPTIONS":
            methods = ", ".join(self._methods(scope))
            await send_bytes(send, b"", status=204, headers={"allow": methods})
            return
        await self._routes(scope, receive, send)

    async def _send_error(self, scope: Scope, send: Send, error: ApiError) -> None:
        answer: Answer = scope["answer"]
        if answer.status:  # too late to say so
            if not answer.is_complete:
                raise ClientDisconnect  # uvicorn closes the connection
            return
        answer.fields["error"] = cut(error.message, 300)
        answer.headers |= error.headers
        if error.status in (408, 413, 431, 503):
            answer.headers["connection"] = "close"
        if error.code == "no_api_key" and scope["path"] == "/":
            error.status = 401  # so that a browser asks for the key, as a password
        if error.status == 401:
            # A browser asks for a password when it opens the page; the page asks for it itself.
            scheme = "Basic" if scope["path"] == "/" else "Bearer"
            answer.headers["www-authenticate"] = f'{scheme} realm="wsekern"'
        await send_bytes(send, error.body(scope["request_id"]), status=error.status)

    async def _send_preflight(self, scope: Scope, send: Send) -> None:
        allowed = {
            "access-control-allow-methods": ", ".join(self._methods(scope)),
            "access-control-allow-headers": "authorization, content-type, x-request-id",
            "access-control-max-age": "600",
        }
        await send_bytes(send, b"", status=204, headers=allowed)

    def _methods(self, scope: Scope) -> list[str]:
        """The methods that a path takes."""
        methods: set[str] = set()
        for route in self._routes.routes:
            if route.matches(scope)[0] is not Match.NONE:
                methods |= getattr(route, "methods", None) or {"GET", "HEAD"}
        if not methods:
            raise _not_found(scope)
        return sorted(methods | {"OPTIONS"})

    def _is_allowed(self, headers: Headers) -> bool:
        """Whether a page of this origin may use the server."""
        origin = headers.get("origin", "")
        if {origin, "*"} & self.interface.settings.origins:
            return True
        try:
            url = urllib.parse.urlsplit(origin)
            return url.hostname in _LOCAL or url.netloc == headers.get("host")
        except ValueError:
            return False

    def _allowed_origin(self, headers: Headers) -> dict[str, str]:
        if not headers.get("origin") or not self._is_allowed(headers):
            return {}
        return {
            "access-control-allow-origin": headers["origin"],
            "access-control-expose-headers": _EXPOSED,
            "vary": "origin",
        }

    def _record(self, scope: Scope, answer: Answer, seconds: float) -> None:
        path, method = scope["path"], scope["method"]
        if path in _UNCOUNTED:
            return
        route = self._route(scope)
        method = method if method in _METHODS else "other"
        self.interface.metrics.requests.add(1, route, method, str(answer.status))
        log(
            "request",
            id=scope["request_id"],
            method=method,
            path=cut(path, 200),
            status=answer.status,
            seconds=round(seconds, 6),
            client=(scope.get("client") or [None])[0],
            key=scope.get("owner") or None,
            **answer.fields,
        )

    def _route(self, scope: Scope) -> str:
        """The path of the route that matches, with its parameters' names."""
        for route in self._routes.routes:
            if route.matches(scope)[0] is not Match.NONE:
                return getattr(route, "path", "other")
        return "other"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9._:-]{1,100}", given) else f"req-{uuid.uuid4().hex}"


def _not_found(scope: Scope) -> ApiError:
    return ApiError(404, f"there is no path {cut(scope['path'], 100)}", "unknown_path")


def _of_routing(error: HTTPException, scope: Scope) -> ApiError:
    if error.status_code == 404:
        return _not_found(scope)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET, HEAD")
        return ApiError(
            405,
            f"{cut(scope['path'], 100)} takes {allowed}, not {cut(scope['method'], 20)}",
            "method_not_allowed",
            headers={"allow": allowed},
        )
    return ApiError(error.status_code, str(error.detail))
