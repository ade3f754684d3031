"""What a request has cost, as its answer says it."""

import time
from typing import Any

from serving.session import Session


def usage_of(session: Session) -> dict[str, Any]:
    """The `usage` of an answer to a chat or a completion."""
    prompt, made = session.prompt_tokens, session.completion_tokens
    usages = [choice.usage for choice in session.choices]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": session.cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(choice.reasoning_tokens for choice in session.choices),
            "accepted_prediction_tokens": sum(usage.accepted_tokens for usage in usages),
            "rejected_prediction_tokens": sum(usage.rejected_tokens for usage in usages),
        },
    }


def time_info_of(session: Session, created: float) -> dict[str, float]:
    """The `time_info` of an answer, in seconds; of several texts, to the last one's end.

    Args:
      session: whose texts have ended.
      created: when the request came, in seconds since 1970.
    """
    now = time.monotonic()
    usages = [choice.usage for choice in session.choices]
    submitted = min(usage.submitted for usage in usages)
    ended = max(usage.finished or now for usage in usages)
    started = min((u.started for u in usages if u.started is not None), default=ended)
    first = min((u.first_token for u in usages if u.first_token is not None), default=ended)
    return {
        "queue_time": max(0.0, started - submitted),
        "prompt_time": max(0.0, first - started),
        "completion_time": max(0.0, ended - first),
        "total_time": max(0.0, ended - submitted),
        "created": created,
    }


def finite_logprob(logprob: float) -> float:
    """A log-probability that JSON can hold: it has no infinity."""
    return max(-9999.0, float(logprob))
