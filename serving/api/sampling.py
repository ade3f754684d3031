"""From the fields of a request to what the engine is asked."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from serving.api.errors import context_overflow, refuse
from serving.request import Matcher, SamplingParams

_COPIED = [
    *("top_p", "frequency_penalty", "presence_penalty"),
    *("top_k", "min_p", "repetition_penalty"),
]
_MOST_SEED = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """How many tokens a text may have, and must."""

    most: int
    least: int


def find_room(fields: Mapping[str, Any], prompt: Sequence[int], context: int, param: str) -> Room:
    """How many tokens a request asks for, cut to what the model's context has room for.

    Args:
      fields: of the request.
      prompt: its tokens.
      context: of the model, in tokens.
      param: the field with the prompt, for errors.

    Raises:
      ApiError: 400; the prompt fills the context, or the fields contradict each other.
    """
    most_name, most = _either(fields, "max_completion_tokens", "max_tokens")
    least_name, least = _either(fields, "min_completion_tokens", "min_tokens")
    if most is not None and most > context:
        refuse(
            most_name,
            f"{most_name} is {most:,}, and the model's context has {context:,} tokens for prompt "
            "and text; ask for fewer",
        )
    room = context - len(prompt)
    if room < 1:
        raise context_overflow(
            f"the prompt has {len(prompt):,} tokens, and the model's context {context:,}: there is "
            "no room for an answer; shorten the prompt",
            param,
        )
    if not prompt:
        refuse(param, f"{param} has no tokens; say something")
    if most is not None and least is not None and 0 <= most < least:
        refuse(least_name, f"{least_name} is {least:,}, more than {most_name}, {most:,}")
    most = room if most in (None, -1) else min(most, room)
    return Room(most=most, least=most if least == -1 else min(least or 0, most))


def _either(fields: Mapping[str, Any], name: str, old: str) -> tuple[str, int | None]:
    """The name and the value of a field that has an older name too."""
    if name in fields and old in fields and fields[name] != fields[old]:
        refuse(old, f"{old} is {fields[old]} and {name} is {fields[name]}; give one of them")
    return (name, fields[name]) if name in fields else (old, fields.get(old))


def make_params(
    fields: Mapping[str, Any],
    room: Room,
    *,
    vocab: int,
    choice: int,
    stop_tokens: tuple[int, ...],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    matcher: Matcher | None = None,
    prediction: tuple[int, ...] = (),
) -> SamplingParams:
    """What the engine is asked for one text.

    Args:
      fields: of the request.
      room: for the text.
      vocab: size of the model's vocabulary.
      choice: the text's number among those of its prompt.
      stop_tokens: end the text.
      logprobs: how many alternatives of each token are reported; None: no probabilities.
      prompt_logprobs: the same of the prompt's tokens.
      matcher: a grammar for this text alone.
      prediction: tokens that the text may resemble.

    Raises:
      ApiError: 400; a token is none of the model's.
    """
    biases = fields.get("logit_bias", {})
    if outside := [token for token in biases if token >= vocab]:
        refuse("logit_bias", f"logit_bias: token {outside[0]} is none of the model's {vocab:,}")
    fields = {**fields, **fields.get("model_parameters", {})}
    return SamplingParams(
        max_tokens=max(1, room.most),
        min_tokens=room.least,
        temperature=fields.get("temperature", 1.0),
        logit_bias=biases,
        seed=None if "seed" not in fields else choice_seed(fields["seed"], choice),
        stop_tokens=stop_tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        matcher=matcher,
        prediction=prediction,
        **{name: fields[name] for name in _COPIED if name in fields},
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one text of a request: another one for each, the same each time.

    The first text has the request's seed, so that it does not depend on how many there are.
    """
    if choice == 0 and 0 <= seed <= _MOST_SEED:
        return seed
    digest = hashlib.sha256(f"{seed} {choice}".encode()).digest()
    return int.from_bytes(digest[:4]) & _MOST_SEED
