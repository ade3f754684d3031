"""`POST /v1/responses`, as OpenAI's client expects it."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from serving.api.bodies import read_object
from serving.api.chat import has_strict_rules
from serving.api.chat_request import ChatJob, prepare_chat
from serving.api.errors import ApiError
from serving.api.interface import Interface, send_object
from serving.api.registry import Served
from serving.api.response_fields import (
    chat_fields,
    messages_of,
    rename_params,
    responses,
    wants_logprobs,
)
from serving.api.response_output import Event, ResponseOutput
from serving.api.streaming import EventStream, unless_gone
from serving.api.usage import usage_of
from serving.session import Piece, Session

_MOST_CUTS = 64  # messages that `truncation: auto` leaves out


async def create(interface: Interface, request: Request, send: Send) -> None:
    """Answers a request, whole or as a stream of events."""
    body = await read_object(request, interface.settings.most_body)
    await unless_gone(request, _answer(interface, request, send, body))


async def retrieve(interface: Interface, request: Request, send: Send) -> None:
    """Sends a stored response again."""
    owner, name = request.scope["owner"], request.path_params["id"]
    await send_object(send, interface.stored.find(owner, name, "response_id").response)


async def delete(interface: Interface, request: Request, send: Send) -> None:
    """Forgets a stored response."""
    name = request.path_params["id"]
    interface.stored.remove(request.scope["owner"], name)
    await send_object(send, {"id": name, "object": "response", "deleted": True})


async def _answer(
    interface: Interface, request: Request, send: Send, body: Mapping[str, Any]
) -> None:
    asked = responses(body, "")
    messages = messages_of(asked["input"])
    if "previous_response_id" in asked:
        name, owner = asked["previous_response_id"], request.scope["owner"]
        earlier = interface.stored.find(owner, name, "previous_response_id")
        messages = [*earlier.messages, *messages]
    interface.log_text(request, "prompt", messages)
    async with interface.acquire(asked["model"]) as served:
        is_strict = has_strict_rules(request)
        job = await asyncio.to_thread(_prepare, asked, messages, served, is_strict)
        with interface.submit(request, served, job.texts) as session:
            writer = _ResponseWriter(
                served=served,
                asked=asked,
                session=session,
                messages=messages,
                output=ResponseOutput(served.text, logprobs=wants_logprobs(asked)),
            )
            if asked.get("stream"):
                await writer.stream(interface, request, send)
            else:
                await writer.send(interface, request, send)


def _prepare(
    asked: Mapping[str, Any], messages: list[dict[str, Any]], served: Served, is_strict: bool
) -> ChatJob:
    """The chat request that asks the same, ready for the engine."""
    for cuts in range(_MOST_CUTS + 1):
        try:
            chat = chat_fields(asked, messages)
            return prepare_chat(chat, served, most_choices=1, strict_rules=is_strict)
        except ApiError as error:
            is_over = error.code == "context_length_exceeded"
            wants_cut = is_over and asked.get("truncation") == "auto"
            if not wants_cut or len(messages) < 2 or cuts == _MOST_CUTS:
                raise rename_params(error) from error
            messages = messages[1:]
    raise AssertionError("the last try returns or raises")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ResponseWriter:
    """Writes the answer to one request."""

    served: Served
    asked: Mapping[str, Any]
    session: Session
    messages: list[dict[str, Any]]
    output: ResponseOutput
    id: str = dataclasses.field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created: float = dataclasses.field(default_factory=time.time)

    async def send(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the whole response when the text has ended."""
        async for _, piece in self.session.pieces():
            self._feed(piece)
        await send_object(send, self._end(interface, request))

    async def stream(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the events as they come."""
        numbers = iter(range(10**9))

        async def tell(stream: EventStream, event: Event) -> None:
            await stream.send_json(event | {"sequence_number": next(numbers)}, event["type"])

        def failure(error: ApiError) -> tuple[str, Event]:
            event = {"type": "error", "code": error.code, "message": error.message}
            return "error", event | {"param": error.param, "sequence_number": next(numbers)}

        ping = interface.settings.ping
        async with EventStream(request, send, ping=ping, error_event=failure) as stream:
            for name in ("response.created", "response.in_progress"):
                begun = self._response("in_progress", output=[])
                await tell(stream, {"type": name, "response": begun})
            async for _, piece in self.session.pieces():
                for event in self._feed(piece):
                    await tell(stream, event)
            response = self._end(interface, request)
            kind = f"response.{response['status']}"
            await tell(stream, {"type": kind, "response": response})

    def _feed(self, piece: Piece) -> list[Event]:
        events = self.output.feed(piece)
        if piece.finish is not None:
            events += self.output.finish("incomplete" if piece.finish == "length" else "completed")
        return events

    def _end(self, interface: Interface, request: Request) -> dict[str, Any]:
        """The whole response, which is stored unless the request forbids it."""
        is_cut = self.session.choices[0].finish == "length"
        status = "incomplete" if is_cut else "completed"
        response = self._response(status, output=self.output.items)
        if self.asked.get("store", True):
            items = [_as_input(item) for item in self.output.items]
            conversation = [*self.messages, *messages_of(items)]
            interface.stored.add(request.scope["owner"], response, conversation)
        interface.log_text(request, "text", self.output.items)
        return response

    def _response(self, status: str, *, output: list[dict[str, Any]]) -> dict[str, Any]:
        asked = self.asked
        is_over = status != "in_progress"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "model": self.served.card.name,
            "status": status,
            "error": None,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "metadata": asked.get("metadata", {}),
            "output": output,
            "parallel_tool_calls": asked.get("parallel_tool_calls", True),
            "previous_response_id": asked.get("previous_response_id"),
            "reasoning": {"effort": asked.get("reasoning", {}).get("effort"), "summary": None},
            "service_tier": "default",
            "store": asked.get("store", True),
            "temperature": asked.get("temperature", 1.0),
            "text": {"format": asked.get("text", {}).get("format", {"type": "text"})},
            "tool_choice": asked.get("tool_choice", "auto"),
            "tools": asked.get("tools", []),
            "top_logprobs": asked.get("top_logprobs", 0),
            "top_p": asked.get("top_p", 1.0),
            "truncation": asked.get("truncation", "disabled"),
            "usage": self._usage() if is_over else None,
            "user": asked.get("user"),
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self.session)
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": usage["total_tokens"],
        }


def _as_input(item: dict[str, Any]) -> dict[str, Any]:
    """An item of the output as one of an input, its parts joined."""
    if "content" not in item:
        return item
    return item | {"content": "".join(part["text"] for part in item["content"])}
