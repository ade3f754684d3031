"""What an answer consists of, and what a reader of a family's markup does."""

import uuid
from typing import Literal, NamedTuple, Protocol

Channel = Literal["content", "reasoning", "tool"]


class Reasoning(NamedTuple):
    """Text that the model wrote to itself before its answer."""

    text: str


class Content(NamedTuple):
    """Text of the answer."""

    text: str


class ToolCall(NamedTuple):
    """The beginning of a call of one of the client's tools."""

    call: int  # from 0, in this answer
    id: str
    name: str


class Arguments(NamedTuple):
    """A piece of a tool call's arguments, which are JSON."""

    call: int
    text: str


Part = Reasoning | Content | ToolCall | Arguments


class Reader(Protocol):
    """Reads one family's markup: text and markers in, parts out."""

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""

    def text(self, text: str) -> list[Part]:
        """Takes the next text."""

    def marker(self, marker: str) -> list[Part]:
        """Takes a marker, such as `</think>`."""

    def finish(self) -> list[Part]:
        """What is held back still; markup that was never completed is content."""


def new_call_id() -> str:
    """An id for a tool call, as the API's clients know them."""
    return f"call_{uuid.uuid4().hex[:24]}"


def merge(parts: list[Part]) -> list[Part]:
    """The same parts, neighbors of one kind joined and empty ones left out."""
    merged: list[Part] = []
    for part in parts:
        if not isinstance(part, ToolCall) and not part.text:
            continue
        last = merged[-1] if merged else None
        if isinstance(part, Reasoning) and isinstance(last, Reasoning):
            merged[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, Content) and isinstance(last, Content):
            merged[-1] = Content(last.text + part.text)
        elif isinstance(part, Arguments) and isinstance(last, Arguments) and part.call == last.call:
            merged[-1] = Arguments(part.call, last.text + part.text)
        else:
            merged.append(part)
    return merged
