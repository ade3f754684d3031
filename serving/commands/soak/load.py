"""The clients of a soak: each sends one random request after the other."""

import asyncio
import collections
import math
import random
import time

from serving.commands.http_client import HttpClient, Refused, Response
from serving.commands.soak.kinds import RESPONSES, Asker, Shot

_PATIENCE = 300.0  # seconds that an answer may take
_LAST_EVENTS = {"response.completed", "response.incomplete"}
_WAIT_IF_FULL = 0.2  # seconds


class Load:
    """Sends requests, and counts what becomes of them.

    Args:
      client: of the server.
      asker: makes the requests.
      most: requests in all; None: no limit.
    """

    def __init__(self, client: HttpClient, asker: Asker, most: int | None = None) -> None:
        self._client, self._asker = client, asker
        self._most = math.inf if most is None else most
        self._begun = 0
        self.outcomes: collections.Counter[tuple[str, str]] = collections.Counter()  # kind, outcome
        self.failures: collections.Counter[str] = collections.Counter()

    @property
    def requests(self) -> int:
        """How many have ended."""
        return self.outcomes.total()

    async def send_each(self, seed: int) -> None:
        """Sends one request of each kind, one after the other."""
        rng = random.Random(seed)
        for kind in self._asker.kinds:
            await self._send(kind, rng)

    async def send_until(self, end: float, seed: str) -> None:
        """Sends random requests until `time.monotonic()` is `end`, or all are sent."""
        rng = random.Random(seed)
        while time.monotonic() < end and self._begun < self._most:
            await self._send(self._asker.choose(rng), rng)

    async def _send(self, kind: str, rng: random.Random) -> None:
        self._begun += 1
        shot = self._asker.make(kind, rng)
        try:
            outcome = await self._outcome(shot)
        except Refused as error:
            outcome = f"{error.status} {error.code or error.message}"
        except TimeoutError:
            outcome = f"no end after {_PATIENCE:g} s"
        except OSError as error:
            outcome = f"connection: {error}"
        if outcome not in ("answered", "refused", "left", "queue full"):
            self.failures[f"{kind}: {outcome}"[:160]] += 1
            outcome = "failed"
        self.outcomes[kind, outcome] += 1

    async def _outcome(self, shot: Shot) -> str:
        """What becomes of a request: a word, or what went wrong."""
        leaves = shot.leaves_after is not None
        try:
            async with asyncio.timeout(shot.leaves_after if leaves else _PATIENCE):
                await self._ask(shot)
        except TimeoutError:
            if not leaves:
                raise
            return "left"
        except Refused as error:
            if error.status == 429:
                await asyncio.sleep(_WAIT_IF_FULL)
                return "queue full"
            # A prompt of words may be longer than the context of a small model.
            if error.status < 500 and (not shot.is_good or error.code == "context_length_exceeded"):
                return "refused"
            raise
        return "answered" if shot.is_good else "answered, although it is wrong"

    async def _ask(self, shot: Shot) -> None:
        if shot.body is None:
            await self._client.get(shot.path, is_json=shot.path != "/metrics")
            return
        async with self._client.post(shot.path, shot.body) as response:
            if isinstance(shot.body, dict) and shot.body.get("stream") is True:
                await _read_stream(response, shot)
            else:
                await response.json()


async def _read_stream(response: Response, shot: Shot) -> None:
    last = None
    async for event in response.events():
        last = event.get("type")
        if shot.pause:
            await asyncio.sleep(shot.pause)
    is_whole = last in _LAST_EVENTS if shot.path == RESPONSES else response.is_done
    if not is_whole:
        raise ConnectionError(f"the stream ended early, after {last!r}")
