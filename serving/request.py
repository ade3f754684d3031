"""What a request asks of the engine, and what the engine answers; imports no jax."""

import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np

Finish = Literal["stop", "length", "cancelled", "error"]
MOST_LOGPROBS = 20  # alternatives of a token whose probabilities a request may ask for
MOST_BIASES = 300  # tokens that a request may give a bias


class Matcher(Protocol):
    """A grammar and the place in it that a text has reached."""

    def fill_mask(self, mask: np.ndarray) -> None:
        """Writes which tokens may come next: bit i of word w is token 32 w + i.

        Args:
          mask: int32, one word for 32 tokens; every word is written.
        """

    def accept(self, token: int) -> bool:
        """Moves on by one token; False, without a move, if the grammar does not allow it."""

    def rollback(self, tokens: int) -> None:
        """Takes the newest `tokens` back."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the text may come next."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Args:
      max_tokens: the most tokens to make; None: as many as the model's context has room for.
      min_tokens: before so many, no token of `stop_tokens` is chosen.
      temperature: 0 takes the likeliest token; higher values sample more freely.
      top_k: sample among the `top_k` likeliest tokens only; None: among all.
      top_p: sample among the fewest likeliest tokens whose probabilities sum to `top_p`.
      min_p: sample among the tokens that are at least `min_p` times as likely as the likeliest.
      frequency_penalty: taken from a token's logit for each time that the text has it already.
      presence_penalty: taken from a token's logit once if the text has it already.
      repetition_penalty: positive logits of tokens in prompt and text are divided by it, negative
        ones multiplied.
      logit_bias: added to the logits of these tokens.
      seed: of the random choices; requests with equal seeds get equal texts. None: a seed that
        the engine draws.
      stop_tokens: a text ends before one of these.
      logprobs: for each token its log-probability and those of so many alternatives; None: none.
      prompt_logprobs: the same for each token of the prompt but the first; the prompt is then read
        whole, whatever is in the cache.
      matcher: a grammar that the text must match.
      prediction: tokens that the text is expected to resemble; they make it faster where they do.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    matcher: Matcher | None = None
    prediction: tuple[int, ...] = ()

    def check(self, vocab: int) -> None:
        """Raises ValueError if a number is out of its range; names it.

        Args:
          vocab: size of the model's vocabulary.
        """
        ranges: dict[str, tuple[float | None, float, float]] = {
            "max_tokens": (self.max_tokens, 1, math.inf),
            "min_tokens": (self.min_tokens, 0, math.inf),
            "temperature": (self.temperature, 0, 100),
            "top_k": (self.top_k, 1, math.inf),
            "top_p": (self.top_p, 0, 1),
            "min_p": (self.min_p, 0, 1),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "repetition_penalty": (self.repetition_penalty, 0.01, 100),
            "logprobs": (self.logprobs, 0, MOST_LOGPROBS),
            "prompt_logprobs": (self.prompt_logprobs, 0, MOST_LOGPROBS),
        }
        for name, (value, low, high) in ranges.items():
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must lie between {low} and {high}")
        if len(self.logit_bias) > MOST_BIASES:
            raise ValueError(
                f"logit_bias has {len(self.logit_bias)} tokens; {MOST_BIASES} is the most"
            )
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocab:
                raise ValueError(f"logit_bias: token {token} is none of the model's {vocab}")
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias[{token}]={bias} must lie between -100 and 100")
        for name, tokens in (("prediction", self.prediction), ("stop_tokens", self.stop_tokens)):
            if outside := [token for token in tokens if not 0 <= token < vocab]:
                raise ValueError(f"{name}: token {outside[0]} is none of the model's {vocab}")


class TokenLogprobs(NamedTuple):
    """How likely a token was under the model, before temperature, penalties and grammar."""

    logprob: float  # in nats
    top: tuple[tuple[int, float], ...]  # the likeliest tokens with theirs, the likeliest first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
    """What the engine adds to a text: the tokens of one step, or of several."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # of each token, if the request asked for them
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # of the prompt, once
    finish: Finish | None = None  # of the last delta: why the text ended
    error: str = ""  # with finish="error": what went wrong


@dataclasses.dataclass(kw_only=True)
class Usage:
    """What a request has taken so far; times are `time.monotonic()`, in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, whose keys and values were in the cache already
    completion_tokens: int = 0
    accepted_tokens: int = 0  # of `prediction`, which the text has
    rejected_tokens: int = 0  # of `prediction`, which were tried and are not in the text
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    started: float | None = None  # when it left the queue
    first_token: float | None = None
    finished: float | None = None


class QueueFull(Exception):
    """The engine has as many waiting requests as it takes; try again later."""


class PromptTooLong(ValueError):
    """A prompt leaves no room in the model's context; no later try helps."""
