"""Send requests at a concurrency or a rate, and time what comes back."""

import asyncio
import random
import secrets
import time
from collections.abc import Iterator
from typing import Any

from serving.commands.bench.arguments import BenchCommand
from serving.commands.bench.figures import Timing
from serving.commands.bench.prompts import FEW_WORDS, MANY_WORDS, PromptMaker, words
from serving.commands.chunks import read_chunk
from serving.commands.http_client import HttpClient, Refused

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_PROBE_TOKENS = 4
_LONGEST_KIND = 80  # characters of a failure in the report


class Load:
    """The requests of one run against one server.

    Args:
      command: says how many, how long and how fast.
      client: of the server.
    """

    def __init__(self, command: BenchCommand, client: HttpClient) -> None:
        self._command, self._client = command, client
        lines: list[str] = []
        if command.prompts is not None:
            text = command.prompts.read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if line.strip()]
            if not lines:
                raise ValueError(f"prompts={command.prompts} has no line")
        self._prompts = PromptMaker(*command.prompt_range, lines)
        self.model = command.model or ""
        self.seed = secrets.randbits(32) if command.seed is None else command.seed
        self.notes: list[str] = []  # what the report must say of the figures
        # Fields of some servers' APIs alone; `prepare` keeps those that this one takes.
        self._takes_least = self._takes_usage = True

    async def prepare(self) -> None:
        """Finds the model, the fields that the server takes, and how long its tokens are.

        Raises:
          Refused: the server refuses a plain request.
          OSError: it is not there.
          ValueError: it lists no model.
        """
        if not self.model:
            listed = (await self._client.get("/v1/models")).get("data") or []
            if not listed:
                raise ValueError(f"{self._client.url} lists no model; name one with --model")
            self.model = listed[0]["id"]
        rng = random.Random(self.seed)
        few = await self._probe(words(FEW_WORDS, rng))
        many = await self._probe(words(MANY_WORDS, rng))
        if few.prompt_tokens is not None and many.prompt_tokens is not None:
            self._prompts.fit(few.prompt_tokens, many.prompt_tokens)
        elif self._command.prompts is None:
            self.notes.append("the server counts no tokens: prompts may be longer or shorter")
        if not self._takes_least:
            self.notes.append("the server takes no min_tokens: answers may be shorter")

    async def _probe(self, prompt: str) -> Timing:
        """Tries a request with fewer fields until the server takes it."""
        while True:
            try:
                return await self._ask(self._body(prompt, _PROBE_TOKENS), time.monotonic(), 0.0)
            except Refused as error:
                if error.status not in (400, 422) or not self._takes_usage:
                    raise
                self._takes_least, self._takes_usage = False, self._takes_least

    async def run(self, concurrency: int, timings: list[Timing]) -> None:
        """Sends the requests of one level.

        Args:
          concurrency: the most at once.
          timings: gets each request as it ends, so that an interrupted run has some.
        """
        rng = random.Random(f"{self.seed} {concurrency}")
        start = time.monotonic()
        jobs = self._jobs(rng)

        async def work() -> None:
            for due, body in jobs:
                if due is not None:
                    await asyncio.sleep(start + due - time.monotonic())
                now = time.monotonic() - start
                timings.append(await self._time(body, start, now if due is None else due))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, self._command.requests)):
                group.create_task(work())

    def _jobs(self, rng: random.Random) -> Iterator[tuple[float | None, dict[str, Any]]]:
        """The time at which each request is due, or None, and its body."""
        due = 0.0
        for index in range(self._command.requests):
            prompt = self._prompts.make(index, rng)
            body = self._body(prompt, rng.randint(*self._command.answer_range))
            yield None if self._command.rate is None else due, body
            if self._command.rate is not None:
                due += rng.expovariate(self._command.rate)

    def _body(self, prompt: str, tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "stream": True, "max_tokens": tokens}
        body["temperature"] = self._command.temperature
        if self._command.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self._takes_least:
            body["min_tokens"] = tokens
        if self._takes_usage:
            body["stream_options"] = {"include_usage": True}
        return body | self._command.fields

    async def _time(self, body: dict[str, Any], start: float, due: float) -> Timing:
        sent = time.monotonic() - start
        try:
            async with asyncio.timeout(self._command.timeout):
                return await self._ask(body, start, due)
        except Refused as error:
            failure = f"{error.status} {error.code or error.message}"
        except TimeoutError:
            failure = f"no end after {self._command.timeout:g} s"
        except OSError as error:
            failure = error.strerror or str(error)
        ended = time.monotonic() - start
        return Timing(due=due, sent=sent, ended=ended, failure=failure[:_LONGEST_KIND])

    async def _ask(self, body: dict[str, Any], start: float, due: float) -> Timing:
        sent = time.monotonic() - start
        first = last = usage = None
        finish, events = None, 0
        async with self._client.post(_PATHS[self._command.endpoint], body) as response:
            async for event in response.events():
                chunk, now = read_chunk(event), time.monotonic() - start
                if chunk.has_text:
                    first, last, events = now if first is None else first, now, events + 1
                finish = chunk.finish or finish
                usage = chunk.usage or usage
            is_whole = response.is_done or finish is not None
        if not is_whole:
            raise ConnectionError("the stream ended before the answer did")
        tokens = (usage or {}).get("completion_tokens")
        return Timing(
            due=due,
            sent=sent,
            first=first,
            last=last,
            ended=time.monotonic() - start,
            prompt_tokens=(usage or {}).get("prompt_tokens"),
            tokens=events if tokens is None else tokens,
            is_counted=tokens is not None,
        )
