"""What the server that runs the HTTP interface may be told."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What one key may ask for; None: as much as it likes. Tokens are of prompt and text.

    Args:
      requests_minute: Requests in a minute.
      requests_hour: Requests in an hour.
      requests_day: Requests in a day.
      tokens_minute: Tokens in a minute that were not in the cache.
      total_tokens_minute: All tokens in a minute.
      tokens_day: All tokens in a day.
    """

    requests_minute: int | None = None
    requests_hour: int | None = None
    requests_day: int | None = None
    tokens_minute: int | None = None
    total_tokens_minute: int | None = None
    tokens_day: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name}={value} must be at least 1, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the HTTP interface behaves; times are in seconds, sizes in bytes.

    Args:
      limits: What one key may ask for.
      most_body: Size of a request's body, at most, before and after it is decompressed.
      most_choices: Texts that one request may ask for, over all its prompts.
      most_connections: Connections that are open at once; further ones are closed with 503.
      header_time: Time for all the headers of a request to come.
      body_time: Time for a body to come; it gets a second more for every `body_rate` bytes.
      body_rate: Bytes a second that a sender must keep up.
      keep_alive: How long a connection without a request stays open.
      send_time: How long a client that reads nothing keeps its request.
      drain_seconds: How long running requests may go on when the server is told to end.
      ping: After so much silence a stream gets a comment, so that nobody in between closes it.
      origins: Browsers' pages that may use the server, besides pages on this machine.
      log_prompts: Whether logs have prompts and texts.
      stored_responses: How many responses `previous_response_id` can name.

    Raises:
      ValueError: a number is out of range.
    """

    limits: RateLimits = RateLimits()
    most_body: int = 8 << 20
    most_choices: int = 64
    most_connections: int = 1000
    header_time: float = 10.0
    body_time: float = 10.0
    body_rate: int = 16 << 10
    keep_alive: float = 15.0
    send_time: float = 60.0
    drain_seconds: float = 30.0
    ping: float = 15.0
    origins: frozenset[str] = frozenset()
    log_prompts: bool = False
    stored_responses: int = 256

    def __post_init__(self) -> None:
        for name in ("most_body", "most_choices", "most_connections", "body_rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("header_time", "body_time", "keep_alive", "send_time", "ping"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 seconds")
        if not 0 <= self.drain_seconds < math.inf:
            raise ValueError(f"drain_seconds={self.drain_seconds} must be 0 or more")
        if self.stored_responses < 0:
            raise ValueError(f"stored_responses={self.stored_responses} must be 0 or more")
