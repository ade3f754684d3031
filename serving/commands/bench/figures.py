"""What a request's times are, and what those of many requests come to."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_SHARES = {"median": 50, "p90": 90, "p99": 99}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """One request; times are in seconds since the first request of its level was due.

    Args:
      due: when it was to be sent.
      sent: when it was.
      first: when the first of its text came; None: none came.
      last: when the last of its text came.
      ended: when the answer was complete, or failed.
      prompt_tokens: as the server counts them; None: it does not.
      tokens: of the answer.
      is_counted: whether the server said how many; else events with text are counted.
      failure: what went wrong, in a few words; None: nothing.
    """

    due: float
    sent: float
    first: float | None = None
    last: float | None = None
    ended: float
    prompt_tokens: int | None = None
    tokens: int = 0
    is_counted: bool = False
    failure: str | None = None

    @property
    def first_token(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None else self.first - self.due

    @property
    def per_token(self) -> float | None:
        """Seconds between one token and the next, on average."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """How a time is distributed over requests, in seconds."""

    median: float
    p90: float
    p99: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class LevelFigures:
    """What the requests of one concurrency come to.

    Args:
      concurrency: the most requests at once.
      requests: that have ended, the failed ones among them.
      seconds: from the first request to the last one's end.
      failures: how many requests failed, by what went wrong.
      first_token: from the time a request is due to the first of its text.
      per_token: between one token and the next, averaged over each request.
      latency: from the time a request is due to the end of its answer.
      lateness: from the time a request is due until it is sent.
      prompt_tokens: of all requests that were answered; None: the server does not count them.
      tokens: of all answers.
      is_counted: whether the server counted all of them.
    """

    concurrency: int
    requests: int
    seconds: float
    failures: dict[str, int]
    first_token: Spread | None
    per_token: Spread | None
    latency: Spread | None
    lateness: Spread | None
    prompt_tokens: int | None
    tokens: int
    is_counted: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers a second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Tokens of prompts a second."""
        if self.prompt_tokens is None:
            return None
        return self.prompt_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures, for JSON; times are in seconds."""
        return dataclasses.asdict(self) | {
            "tokens_per_second": self.tokens_per_second,
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
        }


def summarize(concurrency: int, timings: Sequence[Timing]) -> LevelFigures:
    """The figures of a level's requests."""
    good = [timing for timing in timings if timing.failure is None]
    failed = (timing.failure for timing in timings if timing.failure is not None)
    begin = min((timing.sent for timing in timings), default=0.0)
    end = max((timing.ended for timing in timings), default=0.0)
    prompts = [timing.prompt_tokens for timing in good]
    return LevelFigures(
        concurrency=concurrency,
        requests=len(timings),
        seconds=end - begin,
        failures=dict(collections.Counter(failed).most_common()),
        first_token=_spread([timing.first_token for timing in good]),
        per_token=_spread([timing.per_token for timing in good]),
        latency=_spread([timing.ended - timing.due for timing in good]),
        lateness=_spread([timing.sent - timing.due for timing in timings]),
        prompt_tokens=None if None in prompts else sum(count or 0 for count in prompts),
        tokens=sum(timing.tokens for timing in good),
        is_counted=all(timing.is_counted for timing in good),
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(**{name: float(np.percentile(known, q)) for name, q in _SHARES.items()})
