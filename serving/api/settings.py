"""What the server that runs the HTTP interface may be told."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateLimits:
    """What one key may ask for; None: as much as it likes. Tokens are of prompt and text.

    Args:
      requests_minute: requests in a minute.
      requests_hour: requests in an hour.
      requests_day: requests in a day.
      tokens_minute: tokens in a minute that were not in the cache.
      total_tokens_minute: all tokens in a minute.
      tokens_day: all tokens in a day.
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
      keys: a request must bring one of these; empty: none is needed.
      limits: of each key.
      most_body: of a request's body, before and after it is decompressed.
      most_choices: texts that one request may ask for, over all its prompts.
      most_connections: that are open at once; further ones are closed with 503.
      header_time: for all the headers of a request to come.
      body_time: for a body to come; a body gets a second more for every `body_rate` bytes.
      body_rate: bytes a second that a sender must keep up.
      keep_alive: how long a connection without a request stays open.
      send_time: how long a client that reads nothing keeps its request.
      grace: how long running requests may go on when the server is told to end.
      ping: after so much silence a stream gets a comment, so that nobody in between closes it.
      origins: of browsers' pages that may use the server, besides pages on this machine.
      log_prompts: whether logs have prompts and texts.
      stored_responses: how many responses `previous_response_id` can name.
    """

    keys: frozenset[str] = frozenset()
    limits: RateLimits = RateLimits()
    most_body: int = 8 << 20
    most_choices: int = 64
    most_connections: int = 1000
    header_time: float = 10.0
    body_time: float = 10.0
    body_rate: int = 16 << 10
    keep_alive: float = 15.0
    send_time: float = 60.0
    grace: float = 30.0
    ping: float = 15.0
    origins: frozenset[str] = frozenset()
    log_prompts: bool = False
    stored_responses: int = 256
