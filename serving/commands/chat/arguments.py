"""The arguments of `python -m serving chat`."""

import dataclasses
import math
from typing import Any, Literal

from wsekern.wafer.launch import Platform

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatCommand:
    """Talk with a model in the terminal: of a running server, or loaded into this process.

    A line is a message; /help lists what else can be said. Ctrl-C stops an answer, Ctrl-D ends the
    chat. Answers go to standard output, all else to standard error.
    """

    url: str | None = None
    """Where a server is. None: http://127.0.0.1:8000, unless --model is given."""
    model: str | None = None
    """Without --url, a model that this process loads: a folder of safetensors, a GGUF file, or the
    id of a model on the Hugging Face hub. With --url, what the server calls its model. None: the
    first that the server lists."""
    api_key: str | None = None
    """Sent to the server as a bearer token. None: none is."""
    system: str | None = None
    """The system message, which comes before all others."""
    max_tokens: int | None = None
    """The most tokens of an answer. None: what the context has room for."""
    temperature: float | None = None
    """0 takes the likeliest token; higher values sample more freely. None: the server's default."""
    seed: int | None = None
    """Of sampling; equal chats with equal seeds get equal answers."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of a model that this process loads: parameters and arithmetic. None: the checkpoint's;
    float32 on a CPU."""
    weights: Literal["int8", "int4", "stored"] | None = None
    """Of a model that this process loads: keep weights in eight or four bits, or as the blocks of a
    GGUF file. None: in `dtype`."""
    platform: Platform | None = None
    """Kind of device that loads the model. None: whatever JAX prefers."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be 1 or more")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 or more")
        if not self.is_local:
            for name in ("dtype", "weights", "platform"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is of a model that this process loads: leave out url")

    @property
    def is_local(self) -> bool:
        """Whether this process loads the model."""
        return self.url is None and self.model is not None

    @property
    def fields(self) -> dict[str, Any]:
        """What each request says, besides its messages."""
        names = ("max_tokens", "temperature", "seed")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}
