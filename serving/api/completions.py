"""`POST /v1/completions`: text that goes on from a bare prompt."""

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
from serving.api.errors import ApiError, refuse
from serving.api.interface import Interface, send_object
from serving.api.registry import Served
from serving.api.sampling import find_room, make_params
from serving.api.streaming import EventStream, unless_gone
from serving.api.usage import finite_logprob, time_info_of, usage_of
from serving.session import Choice, Chosen, Piece, Session, TextRequest, join


async def create(interface: Interface, request: Request, send: Send) -> None:
    """Answers a request for completions, whole or as a stream."""
    body = await read_object(request, interface.settings.most_body)
    await unless_gone(request, _answer(interface, request, send, body))


async def _answer(
    interface: Interface, request: Request, send: Send, body: Mapping[str, Any]
) -> None:
    asked = fields.completions(body, "")
    interface.log_text(request, "prompt", asked["prompt"])
    async with interface.acquire(asked["model"]) as served:
        texts = await asyncio.to_thread(_prepare, asked, served, interface.settings.most_choices)
        with interface.submit(request, served, texts) as session:
            writer = _CompletionWriter(served=served, asked=asked, session=session)
            if asked.get("stream"):
                await writer.stream(interface, request, send)
            else:
                await writer.send(interface, request, send)


def _prepare(asked: Mapping[str, Any], served: Served, most_choices: int) -> list[TextRequest]:
    """What the engine is asked: for each prompt, as many texts as the request wants to see."""
    n, best_of = asked.get("n", 1), asked.get("best_of") or asked.get("n", 1)
    if asked.get("best_of") and best_of < n:
        refuse("best_of", f"best_of is {best_of}, and n {n}; best_of must be more than n")
    if best_of > n and asked.get("stream"):
        refuse("best_of", "with best_of, texts cannot be streamed; leave out stream")
    if "stream_options" in asked and not asked.get("stream"):
        refuse("stream_options", "stream_options needs stream: true")
    count = len(asked["prompt"]) * best_of
    if count > most_choices:
        name = "best_of" if best_of > n else "n"
        refuse(
            name, f"the request asks for {count} texts; this server makes {most_choices} at most"
        )
    text, wants = served.text, asked.get("logprobs")
    if best_of > n and wants is None:
        wants = 0  # to compare the texts
    texts = []
    for group, prompt in enumerate(asked["prompt"]):
        tokens = _tokens(prompt, group, served)
        room = find_room(asked, tokens, served.card.context, "prompt")
        texts += [
            TextRequest(
                prompt=tokens,
                group=group,
                params=make_params(
                    asked,
                    room,
                    vocab=text.vocab,
                    choice=choice,
                    stop_tokens=text.stop_tokens,
                    logprobs=wants,
                    prompt_logprobs=asked.get("logprobs") if asked.get("echo") else None,
                ),
                answer=text.completion(asked.get("stop", ()), min_tokens=room.least),
                is_empty=room.most == 0,
            )
            for choice in range(best_of)
        ]
    return texts


def _tokens(prompt: str | list[int], group: int, served: Served) -> list[int]:
    text = served.text
    if isinstance(prompt, str):
        try:
            return text.encode(prompt)
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_prompt", "prompt") from error
    if outside := [token for token in prompt if token >= text.vocab]:
        refuse("prompt", f"prompt has the token {outside[0]}, and the model has {text.vocab:,}")
    return prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CompletionWriter:
    """Writes the answer to one request."""

    served: Served
    asked: Mapping[str, Any]
    session: Session
    id: str = dataclasses.field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: float = dataclasses.field(default_factory=time.time)

    async def send(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the whole answer when all texts have ended."""
        pieces: list[list[Piece]] = [[] for _ in self.session.choices]
        async for index, piece in self.session.pieces():
            pieces[index].append(piece)
        choices = [
            self._choice(place, self.session.choices[index], pieces[index])
            for place, index in enumerate(self._best(pieces))
        ]
        interface.log_text(request, "text", [choice["text"] for choice in choices])
        await send_object(send, self._head() | {"choices": choices} | self._costs())

    async def stream(self, interface: Interface, request: Request, send: Send) -> None:
        """Sends the pieces of all texts as they come."""
        head = self._head()
        wanted = self.asked.get("stream_options", {}).get("include_usage")
        left = len(self.session.choices)
        begun: set[int] = set()
        async with EventStream(request, send, ping=interface.settings.ping) as stream:
            async for index, piece in self.session.pieces():
                source = self.session.choices[index]
                costs: dict[str, Any] = {}
                if piece.finish is not None:
                    left -= 1
                    if not left:
                        costs = self._costs() if wanted is None else self._time_info()
                is_first = index not in begun
                begun.add(index)
                if piece.parts or piece.content or piece.finish is not None or is_first:
                    choice = self._choice(index, source, [piece], echo=is_first)
                    choice["finish_reason"] = piece.finish
                    await stream.send_json(head | {"choices": [choice]} | costs)
            if wanted:
                await stream.send_json(head | {"choices": []} | self._costs())
            await stream.send_done()

    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": int(self.created),
            "model": self.served.card.name,
            "system_fingerprint": self.served.fingerprint,
        }

    def _costs(self) -> dict[str, Any]:
        return {"usage": usage_of(self.session)} | self._time_info()

    def _time_info(self) -> dict[str, Any]:
        return {"time_info": time_info_of(self.session, self.created)}

    def _best(self, pieces: Sequence[Sequence[Piece]]) -> list[int]:
        """Which texts are returned: of each prompt, the `n` likeliest ones."""
        n = self.asked.get("n", 1)
        groups: dict[int, list[int]] = {}
        for index, choice in enumerate(self.session.choices):
            groups.setdefault(choice.request.group, []).append(index)
        best: list[int] = []
        for indices in groups.values():
            if len(indices) > n:
                indices.sort(key=lambda index: -_likelihood(pieces[index]))
            best += indices[:n]
        return best

    def _choice(
        self, place: int, source: Choice, pieces: Sequence[Piece], *, echo: bool = True
    ) -> dict[str, Any]:
        echo = echo and bool(self.asked.get("echo"))
        prompt = list(source.request.prompt) if echo else []
        before = self._echoed(source) if self.asked.get("echo") else ""
        content, _, _ = join(pieces)
        chosen = [one for piece in pieces for one in piece.content]
        choice: dict[str, Any] = {"index": place, "text": (before if echo else "") + content}
        if self.asked.get("return_raw_tokens"):
            choice |= {"text": None, "tokens": [*prompt, *(one.token for one in chosen)]}
        wants = self.asked.get("logprobs")
        rated = map(Chosen, prompt[1:], source.prompt_logprobs)
        choice["logprobs"] = (
            None if wants is None else self._logprobs(prompt, [*rated, *chosen], len(before), wants)
        )
        return choice | {"finish_reason": source.finish}

    def _echoed(self, source: Choice) -> str:
        """The text of a choice's prompt, as the client wrote it."""
        prompt = self.asked["prompt"][source.request.group]
        return prompt if isinstance(prompt, str) else self.served.text.decode(prompt)

    def _logprobs(
        self, prompt: Sequence[int], chosen: Sequence[Chosen], before: int, wants: int
    ) -> dict[str, Any]:
        """The old form of log-probabilities; that of a prompt's first token is null.

        Args:
          prompt: its tokens, if they are echoed.
          chosen: the tokens of the prompt but the first, and of the text.
          before: characters of the prompt.
          wants: how many alternatives of each token.
        """
        name = self.served.text.token_text
        tops: list[dict[str, float] | None] = [None] * len(prompt[:1])
        logprobs: list[float | None] = [None] * len(prompt[:1])
        for one in chosen:
            if one.logprobs is None:
                raise ApiError(500, "the engine gave no log-probabilities", "internal_error")
            own = finite_logprob(one.logprobs.logprob)
            top = {
                name(token): finite_logprob(logprob) for token, logprob in one.logprobs.top[:wants]
            }
            logprobs.append(own)
            tops.append({name(one.token): own} | top)
        offsets, place = [], 0
        for token in prompt:
            offsets.append(min(place, before))
            place += len(self.served.text.decode([token]))
        made = chosen[max(0, len(prompt) - 1) :]
        return {
            "tokens": [name(token) for token in (*prompt[:1], *(one.token for one in chosen))],
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets + [before + one.offset for one in made],
        }


def _likelihood(pieces: Sequence[Piece]) -> float:
    """The mean log-probability of a text's tokens."""
    found = [one.logprobs.logprob for p in pieces for one in p.content if one.logprobs is not None]
    return sum(found) / len(found) if found else 0.0
