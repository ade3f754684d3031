"""Limit how many requests and tokens each key may use, by token buckets.

A bucket holds as much as may be used in its window, and fills evenly. A request is charged before
it runs: its prompt and the most tokens that it may make. What it has not used is given back.
"""

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping

from serving.api.errors import ApiError
from serving.api.settings import RateLimits

_MOST_OWNERS = 10_000
_WINDOWS = {"minute": 60.0, "hour": 3600.0, "day": 86400.0}


@dataclasses.dataclass
class _Bucket:
    name: str  # as in the headers: "requests-day"
    counts: str  # "requests", "uncached" or "total"
    size: float
    window: float  # seconds
    level: float
    time: float

    def fill(self, now: float) -> None:
        """Adds what has come since the last time."""
        grown = self.level + (now - self.time) * self.size / self.window
        self.level, self.time = min(self.size, grown), now

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (amount - self.level) * self.window / self.size)


@dataclasses.dataclass
class Charge:
    """What a request has been charged, until it is settled."""

    buckets: list[_Bucket]
    tokens: float
    headers: Mapping[str, str]


class Limiter:
    """The buckets of every key."""

    def __init__(self, limits: RateLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = [
            (name, counts, size)
            for name, counts, size in (
                ("requests-minute", "requests", limits.requests_minute),
                ("requests-hour", "requests", limits.requests_hour),
                ("requests-day", "requests", limits.requests_day),
                ("tokens-minute", "uncached", limits.tokens_minute),
                ("total-tokens-minute", "total", limits.total_tokens_minute),
                ("tokens-day", "total", limits.tokens_day),
            )
            if size is not None
        ]
        self._clock = clock
        self._owners: dict[str, list[_Bucket]] = {}
        self._lock = threading.Lock()

    def charge(self, owner: str, tokens: int) -> Charge:
        """Takes one request and its estimated tokens from the buckets of a key.

        Raises:
          ApiError: 429; it says which bucket, and when to try again.
        """
        if not self._limits:
            return Charge([], tokens, {})
        with self._lock:
            buckets = self._buckets(owner)
            now = self._clock()
            for bucket in buckets:
                bucket.fill(now)
            for bucket in buckets:
                amount = 1 if bucket.counts == "requests" else tokens
                if amount > bucket.level:
                    raise _refusal(bucket, amount, _headers(buckets))
            for bucket in buckets:
                bucket.level -= 1 if bucket.counts == "requests" else tokens
            return Charge(buckets, tokens, _headers(buckets))

    def settle(self, charge: Charge, used: int, cached: int) -> None:
        """Gives back what a request has not used.

        Args:
          charge: of the request.
          used: tokens of its prompt and its texts.
          cached: of these, the ones that were in the cache.
        """
        with self._lock:
            for bucket in charge.buckets:
                if bucket.counts != "requests":
                    spent = used - cached if bucket.counts == "uncached" else used
                    bucket.level = min(bucket.size, bucket.level + charge.tokens - spent)

    def _buckets(self, owner: str) -> list[_Bucket]:
        if owner not in self._owners:
            if len(self._owners) >= _MOST_OWNERS:
                del self._owners[next(iter(self._owners))]
            now = self._clock()
            self._owners[owner] = [
                _Bucket(name, counts, size, _WINDOWS[name.rpartition("-")[2]], size, now)
                for name, counts, size in self._limits
            ]
        return self._owners[owner]


def _headers(buckets: list[_Bucket]) -> dict[str, str]:
    headers = {}
    for bucket in buckets:
        full = (bucket.size - bucket.level) * bucket.window / bucket.size
        for kind, value in (
            ("limit", f"{bucket.size:.0f}"),
            ("remaining", f"{max(0, math.floor(bucket.level))}"),
            ("reset", f"{max(0.0, full):.3f}"),
        ):
            headers[f"x-ratelimit-{kind}-{bucket.name}"] = value
    return headers


def _refusal(bucket: _Bucket, amount: float, headers: dict[str, str]) -> ApiError:
    kind, _, window = bucket.name.rpartition("-")
    counted = "requests" if bucket.counts == "requests" else "tokens"
    if amount > bucket.size:
        return ApiError(
            429,
            f"this request may take {amount:,.0f} tokens, and the limit is {bucket.size:,.0f} "
            f"{kind} per {window}; ask for fewer",
            "token_quota_exceeded",
            "quota",
            headers=headers | {"x-should-retry": "false"},
        )
    wait = math.ceil(bucket.wait(amount))
    return ApiError(
        429,
        f"limit of {bucket.size:,.0f} {kind} per {window} exceeded; try again in {wait} s",
        "request_quota_exceeded" if counted == "requests" else "token_quota_exceeded",
        "quota",
        headers=headers | {"retry-after": str(max(1, wait)), "x-should-retry": "true"},
    )
