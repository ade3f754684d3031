"""`POST /v1/chat/completions`."""

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import Send

from serving.api import fields
from serving.api.bodies import read_object
from serving.api.chat_request import ChatJob, prepare_chat
from serving.api.errors import ApiError, refuse
from serving.api.interface import Interface, send_object
from serving.api.registry import Served
from serving.api.streaming import EventStream, unless_gone
from serving.api.usage import finite_logprob, time_info_of, usage_of
from serving.session import Chosen, Piece, Session, join
from serving.text.model_text import ModelText
from serving.text.parsers.parts import Arguments, Content, Reasoning, ToolCall


async def create(interface: Interface, request: Request, send: Send) -> None:
    """Answers a chat, whole or as a stream."""
    body = await read_object(request, interface.settings.most_body)
    await unless_gone(request, _answer(interface, request, send, body))


async def _answer(
    interface: Interface, request: Request, send: Send, body: Mapping[str, Any]
) -> None:
    asked = fields.chat(body, "")
    interface.log_text(request, "prompt", asked["messages"])
    async with interface.acquire(asked["model"]) as served:
        job = await asyncio.to_thread(
            prepare_chat,
            asked,
            served,
            most_choices=interface.settings.most_choices,
            strict_rules=has_strict_rules(request),
        )
        with interface.submit(request, served, job.texts) as session:
            writer = _ChatWriter(served=served, job=job, session=session)
            if asked.get("stream"):
                await writer.stream(interface, request, send)
            else:
                await writer.send(interface, request, send)


def has_strict_rules(request: Request) -> bool:
    """Whether the client's version of the API has strict schemas close every object."""
    version = request.headers.get("x-cerebras-version-patch", "2")
    if version not in ("1", "2"):
        refuse("X-Cerebras-Version-Patch", f"the version is {version[:20]!r}; it must be 1 or 2")
    return version == "2"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ChatWriter:
    """Writes the answer to one chat request."""

    served: Served
    job: ChatJob
    session: Session
    id: str = dataclasses.field(default_factory=lambda: f"chatcmpl-{uuid.uuid4()}")
    created: float = dataclasses.field(default_factory=time.time)

    async def send(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the whole answer when all texts have ended."""
        pieces: list[list[Piece]] = [[] for _ in self.session.choices]
        async for index, piece in self.session.pieces():
            pieces[index].append(piece)
        choices = [self._choice(index, some) for index, some in enumerate(pieces)]
        interface.log_text(request, "text", [choice["message"] for choice in choices])
        answer = self._head("chat.completion") | {"choices": choices} | self._costs()
        await send_object(send, answer)

    async def stream(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the pieces of all texts as they come."""
        head = self._head("chat.completion.chunk")
        wanted = self.job.fields.get("stream_options", {}).get("include_usage")
        left = len(self.session.choices)
        async with EventStream(request, send, ping=interface.settings.ping) as stream:
            for index in range(left):
                first = {"index": index, "delta": {"role": "assistant"}, "finish_reason": None}
                await stream.send_json(head | {"choices": [first]})
            async for index, piece in self.session.pieces():
                for choice in self._chunks(index, piece):
                    costs = {}
                    if choice["finish_reason"] is not None:
                        left -= 1
                        if not left:
                            costs = self._costs() if wanted is None else self._time_info()
                    await stream.send_json(head | {"choices": [choice]} | costs)
            if wanted:
                await stream.send_json(head | {"choices": []} | self._costs())
            await stream.send_done()

    def _head(self, kind: str) -> dict[str, Any]:
        head = {
            "id": self.id,
            "object": kind,
            "created": int(self.created),
            "model": self.served.card.name,
            "system_fingerprint": self.served.fingerprint,
        }
        if "service_tier" in self.job.fields:
            head["service_tier"] = "default"  # there is one
        return head

    def _costs(self) -> dict[str, Any]:
        return {"usage": usage_of(self.session)} | self._time_info()

    def _time_info(self) -> dict[str, Any]:
        return {"time_info": time_info_of(self.session, self.created)}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, reasoning, calls = join(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning and self.job.shows_reasoning:
            message["reasoning"] = reasoning
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        choice = {
            "index": index,
            "message": message,
            "finish_reason": self.session.choices[index].finish,
        }
        return choice | self._logprobs(pieces)

    def _chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a piece: the finish comes alone, as clients expect."""
        delta: dict[str, Any] = {}
        for part in piece.parts:
            match part:
                case Content(text):
                    delta["content"] = delta.get("content", "") + text
                case Reasoning(text):
                    if self.job.shows_reasoning:
                        delta["reasoning"] = delta.get("reasoning", "") + text
                case ToolCall(place, id, name):
                    call = {"index": place, "id": id, "type": "function"}
                    call["function"] = {"name": name, "arguments": ""}
                    delta.setdefault("tool_calls", []).append(call)
                case Arguments(place, text):
                    call = {"index": place, "type": "function", "function": {"arguments": text}}
                    delta.setdefault("tool_calls", []).append(call)
        chunks = []
        logprobs = self._logprobs([piece]) if piece.content or piece.reasoning else {}
        if delta or logprobs:
            chunks.append({"index": index, "delta": delta, "finish_reason": None} | logprobs)
        if piece.finish is not None:
            chunks.append({"index": index, "delta": {}, "finish_reason": piece.finish})
        return chunks

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        if not self.job.fields.get("logprobs"):
            return {}
        text = self.served.text
        content, reasoning = list[Any](), list[Any]()
        for piece in pieces:
            (content if self.job.is_raw else reasoning).extend(piece.reasoning)
            content += piece.content
        content = [token_logprobs(text, chosen) for chosen in content]
        found: dict[str, Any] = {"logprobs": {"content": content, "refusal": None}}
        reasoning = [token_logprobs(text, chosen) for chosen in reasoning]
        if reasoning and self.job.shows_reasoning:
            found["reasoning_logprobs"] = {"content": reasoning, "refusal": None}
        return found


def token_logprobs(text: ModelText, chosen: Chosen) -> dict[str, Any]:
    """A token, its log-probability and those of its alternatives."""
    if chosen.logprobs is None:
        raise ApiError(500, "the engine gave no log-probabilities", "internal_error")
    return _named(text, chosen.token, chosen.logprobs.logprob) | {
        "top_logprobs": [_named(text, token, logprob) for token, logprob in chosen.logprobs.top]
    }


def _named(text: ModelText, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": text.token_text(token),
        "logprob": finite_logprob(logprob),
        "bytes": text.token_bytes(token),
    }
