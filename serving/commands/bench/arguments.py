"""The arguments of `python -m serving bench`."""

import dataclasses
import math
import pathlib
from typing import Any, Literal

from models.checkpoints.json_file import parse_json
from wsekern.estimator.pictures.figure import check_installed
from wsekern.estimator.pictures.output import check_writable

PLOTS = (".svg", ".png", ".pdf", ".html")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchCommand:
    """Load a server of OpenAI's API with requests, and time its answers.

    Any such server will do: this one, llama.cpp's, vLLM. Prompts are random words, other ones in
    each request, so that a prefix cache helps with none. Ctrl-C prints what is measured so far.
    """

    url: str = "http://127.0.0.1:8000"
    """Where the server is."""
    model: str | None = None
    """What the server calls the model. None: the first that it lists."""
    api_key: str | None = None
    """Sent as a bearer token. None: none is."""
    endpoint: Literal["chat", "completions"] = "chat"
    """Whether a prompt is the message of a chat, or bare."""
    concurrency: tuple[int, ...] = ()
    """Requests that run at once; several numbers are measured one after the other. None given: 1 8
    32; with --rate, as many as arrive."""
    rate: float | None = None
    """Requests that arrive in a second, at random times (a Poisson process). Times count from the
    arrival. None: the next request is sent when one ends."""
    requests: int = 64
    """Requests at each concurrency."""
    prompt_tokens: str = "128"
    """Tokens of a prompt with its markup, about: a number, or a range as 64-256."""
    max_tokens: str = "128"
    """Tokens of an answer: a number, or a range. Servers that know `min_tokens` are asked for
    exactly so many."""
    temperature: float = 0.0
    """0 takes the likeliest token; higher values sample more freely."""
    seed: int | None = None
    """Of prompts, lengths and arrivals. None: another one each time, so that a prefix cache helps
    with none of a second run's prompts either."""
    prompts: pathlib.Path | None = None
    """A file with a prompt a line, sent in turn instead of random words."""
    body: str = "{}"
    """Further fields of each request, in JSON, such as '{"ignore_eos": true}' for llama.cpp."""
    timeout: float = 600.0
    """Seconds after which a request has failed."""
    json: pathlib.Path | None = None
    """Write all figures, and those of each request, to this file."""
    plot: pathlib.Path | None = None
    """Draw the figures to this file: .svg, .png, .pdf, or .html with the table."""

    def __post_init__(self) -> None:
        for value in self.concurrency:
            if value < 1:
                raise ValueError(f"concurrency={value} must be 1 or more")
        if self.requests < 1:
            raise ValueError(f"requests={self.requests} must be 1 or more")
        for name in ("rate", "timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}={value} must be positive")
        _ = self.prompt_range, self.answer_range, self.fields  # raise what is wrong with them
        if self.json is not None:
            check_writable(self.json)
        if self.plot is not None:
            check_writable(self.plot, PLOTS)
            check_installed()

    @property
    def levels(self) -> tuple[int, ...]:
        """The most requests at once, one after the other."""
        return self.concurrency or ((1, 8, 32) if self.rate is None else (self.requests,))

    @property
    def prompt_range(self) -> tuple[int, int]:
        """The fewest and the most tokens of a prompt."""
        return _range("prompt_tokens", self.prompt_tokens)

    @property
    def answer_range(self) -> tuple[int, int]:
        """The fewest and the most tokens of an answer."""
        return _range("max_tokens", self.max_tokens)

    @property
    def fields(self) -> dict[str, Any]:
        """The further fields that `body` spells."""
        return parse_json(self.body.encode(errors="replace"), "body")


def _range(name: str, text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        numbers = int(low), int(high or low)
    except ValueError:
        numbers = 0, 0
    if not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"{name}={text!r} must be a number, or a range such as 64-256")
    return numbers
