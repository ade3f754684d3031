"""The HTTP interface: its routes, and what every request meets before them."""

from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from serving.api import chat, completions, page_route, records, responses, status
from serving.api.door import Door
from serving.api.interface import Interface
from serving.api.registry import Models
from serving.api.settings import Settings

Handler = Callable[[Interface, Request, Send], Awaitable[None]]


def build_app(
    models: Models, settings: Settings | None = None, *, keys: frozenset[str] = frozenset()
) -> Door:
    """An ASGI application that serves models.

    Args:
      models: by name; they may be loading still.
      settings: by default there are no rate limits.
      keys: a request must bring one of these; empty: none is needed.
    """
    interface = Interface(models, settings or Settings(), keys)

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        return Route(path, _Endpoint(interface, handler), methods=[method])

    routes: list[Any] = [
        route("/v1/chat/completions", chat.create, "POST"),
        route("/v1/completions", completions.create, "POST"),
        route("/v1/responses", responses.create, "POST"),
        route("/v1/responses/{id}", responses.retrieve),
        route("/v1/responses/{id}", responses.delete, "DELETE"),
        route("/v1/models", records.list_models),
        route("/v1/models/{id:path}", records.retrieve),
        route("/public/v1/models", records.list_public),
        route("/public/v1/models/{id:path}", records.retrieve_public),
        route("/v1/tcp_warming", status.warm),
        route("/health", status.health),
        route("/metrics", status.metrics),
        route("/slots", status.slots),
    ]
    if page_route.FILE.exists():
        routes.append(route("/", page_route.show))
    return Door(Router(routes, redirect_slashes=False), interface)


class _Endpoint:
    """One route's handler, as an ASGI application."""

    def __init__(self, interface: Interface, handler: Handler) -> None:
        self._interface = interface
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._handler(self._interface, Request(scope, receive), send)
