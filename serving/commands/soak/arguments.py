"""The arguments of `python -m serving soak`."""

import dataclasses
import math
import pathlib
import shlex

from wsekern.estimator.pictures.output import check_writable


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoakCommand:
    """Keep a server at full load, and see whether it stays as it was; status 1 if it does not.

    Requests are of every kind, at random: chats, completions and responses, whole and streamed,
    tools, schemas, long prompts, clients that leave or read slowly, and bad input. A line a minute
    says how the server is. At the end its memory must be flat, its file descriptors those of the
    beginning, and no slot or page held.
    """

    model: str | None = None
    """Start a server of this model: a folder of safetensors, a GGUF file, or an id on the hub."""
    server_flags: str = ""
    """Further flags of that server, as in --server-flags='--max-streams 8 --platform cpu'."""
    log: pathlib.Path | None = None
    """Where that server's log goes. None: nowhere."""
    url: str | None = None
    """Instead of --model, where a server of `python -m serving` runs on this machine."""
    pid: int | None = None
    """With --url: the server's process."""
    api_key: str | None = None
    """With --url: sent as a bearer token. None: none is."""
    name: str | None = None
    """What the server calls the model. None: the first that it lists."""
    minutes: float = 20.0
    """How long the load lasts."""
    requests: int | None = None
    """End earlier, after so many requests. None: only when the time is over."""
    concurrency: int = 48
    """Clients that send one request after the other."""
    seed: int = 0
    """Of the requests' kinds and contents."""
    json: pathlib.Path | None = None
    """Write the verdict, the counts and the server's memory over time to this file."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.url is None):
            raise ValueError("give either model, for a server that is started, or url")
        if (self.url is None) != (self.pid is None):
            raise ValueError("url and pid belong together: give both, or neither")
        if not (self.minutes > 0 and math.isfinite(self.minutes)):
            raise ValueError(f"minutes={self.minutes} must be positive")
        for name, value in (("requests", self.requests), ("concurrency", self.concurrency)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if self.json is not None:
            check_writable(self.json)

    @property
    def server_argv(self) -> list[str]:
        """The arguments of the server that is started."""
        return ["--model", self.model or "", *shlex.split(self.server_flags)]
