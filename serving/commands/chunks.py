"""What a chunk of a streamed answer says, of a chat or of a completion."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Chunk(NamedTuple):
    """One event of a stream."""

    content: str = ""
    reasoning: str = ""
    has_call: bool = False  # whether a tool's call, or a part of one, is in it
    finish: str | None = None
    usage: Mapping[str, Any] | None = None

    @property
    def has_text(self) -> bool:
        """Whether the model has said something in it."""
        return bool(self.content or self.reasoning or self.has_call)


def read_chunk(event: Mapping[str, Any]) -> Chunk:
    """The chunk that an event holds; of several choices, all that they say.

    Args:
      event: a `chat.completion.chunk` or a `text_completion`. Of reasoning, the names that
        Cerebras' API and llama.cpp give it are known.
    """
    content = reasoning = ""
    has_call, finish = False, None
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        content += delta.get("content") or choice.get("text") or ""
        reasoning += delta.get("reasoning") or delta.get("reasoning_content") or ""
        has_call = has_call or bool(delta.get("tool_calls"))
        finish = choice.get("finish_reason") or finish
    return Chunk(content, reasoning, has_call, finish, event.get("usage"))
