"""An engine without a model: it says what a test wants, at the pace that a test wants."""

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from models.text.tokenizer import bytes_tokenizer
from serving.api.app import build_app
from serving.api.registry import LoadedModels, ModelCard, Served
from serving.api.server import HttpServer
from serving.api.settings import Settings
from serving.request import Delta, PromptTooLong, QueueFull, SamplingParams, TokenLogprobs, Usage
from serving.text.model_text import ModelText

Reply = Callable[[list[int], SamplingParams], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Slot:
    id: str
    state: str
    prompt_tokens: int
    tokens: int
    most_tokens: int
    pages: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    slots: tuple[Slot, ...]
    waiting: int = 0
    max_streams: int = 4
    pages_total: int = 64
    pages_free: int = 64
    pages_evictable: int = 0
    pages_held: int = 0
    page_tokens: int = 16
    page_kinds: str = "." * 64
    grid: tuple[int, int] = (1, 1)
    totals: dict[str, float] = dataclasses.field(default_factory=lambda: {"steps": 3.0})


class Generation:
    """Says its tokens one by one."""

    def __init__(self, engine: "ScriptedEngine", prompt: list[int], params: SamplingParams):
        self.id = str(id(self))
        self.usage = Usage(prompt_tokens=len(prompt), cached_tokens=engine.cached)
        self.usage.started = time.monotonic()
        self.is_cancelled = False
        self._engine, self._prompt, self._params = engine, prompt, params

    def cancel(self) -> None:
        self.is_cancelled = True
        self._engine.running.pop(self.id, None)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        engine, params = self._engine, self._params
        tokens = list(engine.reply(self._prompt, params))
        room = engine.context - len(self._prompt)
        most = min(params.max_tokens or room, room)
        if params.prompt_logprobs is not None:
            likely = tuple((ord("~") + i, -3.0 - i) for i in range(params.prompt_logprobs))
            scores = (TokenLogprobs(-2.0, likely),) * (len(self._prompt) - 1)
            yield Delta(prompt_logprobs=scores)
        for index, token in enumerate(tokens[:most]):
            await asyncio.sleep(engine.pause)
            if self.is_cancelled:
                yield self._end(Delta(finish="cancelled"))
                return
            if engine.error and index >= engine.error_after:
                yield self._end(Delta(finish="error", error=engine.error))
                return
            self.usage.first_token = self.usage.first_token or time.monotonic()
            self.usage.completion_tokens += 1
            logprobs: tuple[TokenLogprobs, ...] = ()
            if params.logprobs is not None:
                top = tuple((token + i, -1.0 - i) for i in range(params.logprobs))
                logprobs = (TokenLogprobs(engine.logprob_of.get(token, -1.0), top),)
            yield Delta(tokens=(token,), logprobs=logprobs)
        yield self._end(Delta(finish="length" if len(tokens) >= most else "stop"))

    def _end(self, delta: Delta) -> Delta:
        self.usage.finished = time.monotonic()
        self._engine.running.pop(self.id, None)
        return delta


class ScriptedEngine:
    """Says what `reply` makes of a prompt, a token each `pause` seconds."""

    def __init__(self, reply: Reply, *, context: int = 4096) -> None:
        self.reply = reply
        self.context = context
        self.pause = 0.0
        self.cached = 0
        self.error, self.error_after = "", 0
        self.queue_is_full = False
        self.is_alive = True
        self.failure: BaseException | None = None
        self.logprob_of: dict[int, float] = {}  # -1 for other tokens
        self.running: dict[str, Generation] = {}
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.shown = Snapshot(())  # but for its slots
        self.lock = threading.Lock()

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Generation:
        params.check(256)
        if self.queue_is_full:
            raise QueueFull("64 requests wait")
        if len(prompt) >= self.context:
            raise PromptTooLong(f"the prompt has {len(prompt)} tokens")
        with self.lock:
            self.asked.append((list(prompt), params))
            generation = Generation(self, list(prompt), params)
            self.running[generation.id] = generation
        return generation

    def snapshot(self) -> Snapshot:
        slots = tuple(Slot(name, "decode", 3, 1, 8, 1) for name in self.running)
        return dataclasses.replace(self.shown, slots=slots)

    def close(self, timeout: float) -> None:
        for generation in tuple(self.running.values()):
            generation.cancel()


def build_server(
    engine: ScriptedEngine,
    template: str | None = None,
    keys: frozenset[str] = frozenset(),
    **settings: Any,
) -> HttpServer:
    """A server with one model, "scripted", on bytes."""
    tokenizer = dataclasses.replace(bytes_tokenizer(), template=template)
    text = ModelText(tokenizer, vocab=256)
    card = ModelCard(name="scripted", context=engine.context)
    served = Served(card=card, engine=engine, text=text, fingerprint="fp_test")
    app = build_app(LoadedModels([served]), Settings(**settings), keys=keys)
    return HttpServer(app, port=0)
