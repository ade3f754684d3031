"""What all routes share: the models, the settings, and what is counted."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from serving.api.errors import ApiError, as_api_error, unknown_model
from serving.api.keys import Keys
from serving.api.limits import Limiter
from serving.api.logs import log
from serving.api.metrics import Metrics
from serving.api.registry import Models, ModelUnavailable, Served
from serving.api.settings import Settings
from serving.api.stored_responses import StoredResponses
from serving.request import PromptTooLong, QueueFull
from serving.session import Session, TextRequest

_GUESSED_TOKENS = 1024  # that a request is charged if it does not say how many it may make


class Interface:
    """The state of one HTTP interface."""

    def __init__(
        self, models: Models, settings: Settings, keys: frozenset[str] = frozenset()
    ) -> None:
        self.models = models
        self.settings = settings
        self.metrics = Metrics()
        self.keys = Keys(keys)
        self.limiter = Limiter(settings.limits)
        self.stored = StoredResponses(settings.stored_responses)
        self.is_draining = False
        self._sessions: set[Session] = set()

    def drain(self) -> None:
        """Takes no more requests; those that wait for a model to load end with 503."""
        self.is_draining = True
        self.models.stop_loading()

    def cancel_all(self) -> None:
        """Ends every running text, when a server that drains has waited long enough."""
        for session in tuple(self._sessions):
            session.cancel()

    @contextlib.asynccontextmanager
    async def acquire(self, name: str) -> AsyncIterator[Served]:
        """The model that a request names.

        Raises:
          ApiError: 404, there is no such model; 503, the server is loading, or ending, or the
            model does not load.
        """
        if self.is_draining:
            raise _ending()
        if self.models.state != "ready":
            raise ApiError(
                503,
                "the model is loading; try again later",
                "loading",
                headers={"retry-after": "2"},
            )
        async with contextlib.AsyncExitStack() as stack:
            try:
                served = await stack.enter_async_context(self.models.acquire(name))
            except KeyError:
                raise unknown_model(name) from None
            except ModelUnavailable as error:
                if self.is_draining:
                    raise _ending() from None
                raise ApiError(
                    503, str(error), "model_unavailable", headers={"x-should-retry": "false"}
                ) from None
            yield served

    @contextlib.contextmanager
    def submit(
        self, request: Request, served: Served, texts: list[TextRequest]
    ) -> Iterator[Session]:
        """The texts of a request, charged, counted and logged; they end with the block.

        Raises:
          ApiError: 400 or 429.
        """
        prompts = {text.group: len(text.prompt) for text in texts}
        made = sum(text.params.max_tokens or _GUESSED_TOKENS for text in texts)
        charge = self.limiter.charge(request.scope["owner"], sum(prompts.values()) + made)
        request.scope["answer"].headers.update(charge.headers)
        session = None
        try:
            session = _submit(served, texts)
            self._sessions.add(session)
            yield session
        finally:
            if session is None:
                self.limiter.settle(charge, 0, 0)
            else:
                session.cancel()
                self._sessions.discard(session)
                self.limiter.settle(
                    charge,
                    session.prompt_tokens + session.completion_tokens,
                    session.cached_tokens,
                )
                self._count(request, served.card.name, session)

    def _count(self, request: Request, model: str, session: Session) -> None:
        counted = self.metrics
        counted.prompt_tokens.add(session.prompt_tokens, model)
        counted.cached_tokens.add(session.cached_tokens, model)
        counted.completion_tokens.add(session.completion_tokens, model)
        for choice in session.choices:
            counted.finishes.add(1, model, choice.finish or "cancelled")
            usage = choice.usage
            if usage.started is not None:
                counted.queue_time.observe(usage.started - usage.submitted)
            if usage.first_token is not None:
                counted.first_token.observe(usage.first_token - usage.submitted)
                if usage.finished is not None and choice.tokens > 1:
                    time = (usage.finished - usage.first_token) / (choice.tokens - 1)
                    counted.token_time.observe(time, choice.tokens - 1)
        request.scope["answer"].fields.update(
            model=model,
            prompt_tokens=session.prompt_tokens,
            cached_tokens=session.cached_tokens,
            completion_tokens=session.completion_tokens,
            finish=[choice.finish or "cancelled" for choice in session.choices],
        )

    def log_text(self, request: Request, event: str, text: Any) -> None:
        """Writes a prompt or a text to the log, if that is wished."""
        if self.settings.log_prompts:
            log(event, id=request.scope["request_id"], text=text)


def _ending() -> ApiError:
    return ApiError(503, "the server is ending; ask another one", "server_ending")


def _submit(served: Served, texts: list[TextRequest]) -> Session:
    try:
        return Session(served.engine, texts)
    except (QueueFull, PromptTooLong) as error:
        raise as_api_error(error) from error
    except ValueError as error:
        raise ApiError(400, str(error), "invalid_value") from error
    except RuntimeError as error:  # the engine has failed, or is closing
        raise ApiError(503, str(error), "engine_closed", headers={"retry-after": "5"}) from error


async def send_object(send: Send, value: Any, status: int = 200) -> None:
    """Answers with an object as JSON."""
    await send_bytes(send, json.dumps(value, ensure_ascii=False).encode(), status=status)


async def send_bytes(
    send: Send,
    body: bytes,
    *,
    status: int = 200,
    kind: str = "application/json",
    headers: Mapping[str, str] | None = None,
) -> None:
    """Answers with bytes of a content type."""
    sent = {"content-type": kind, "content-length": str(len(body)), **(headers or {})}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(k.encode("latin-1"), v.encode("latin-1")) for k, v in sent.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
