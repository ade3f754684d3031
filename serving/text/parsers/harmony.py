"""gpt-oss's format, harmony: messages on channels, of which some call tools.

    <|channel|>analysis<|message|>Let me see.<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>Paris.<|return|>

https://cookbook.openai.com/articles/openai-harmony
"""

import re
from collections.abc import Callable
from typing import Literal

from serving.text.parsers.parts import (
    Arguments,
    Channel,
    Content,
    Part,
    Reasoning,
    ToolCall,
    new_call_id,
)

_ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", *_ENDS)
_RECIPIENT = re.compile(r"\bto=(\S+)")
_BEGUN_HEADER = re.compile(
    r"(<\|start\|>)?(assistant)?( to=\S*)?"
    r"(<\|channel\|>\s*\w*(\s+to=\S*)?\s*((<\|constrain\|>)?\s*\w*)?\s*)?"
)
_LONGEST_HEADER = 256  # characters; a longer one is none
_START = " to="  # what a first message's header may begin with, if not with a channel


class HarmonyReader:
    """Separates the channels: analysis is reasoning, calls of functions are tool calls.

    Args:
      tools: whether the client gave tools; without, calls are content.
      new_id: makes the ids of calls.
    """

    def __init__(self, *, tools: bool, new_id: Callable[[], str] = new_call_id) -> None:
        self._tools = tools
        self._new_id = new_id
        self._calls = 0
        # A prompt ends with "<|start|>assistant": the header of the first message comes next.
        self._state: Literal["header", "body", "between"] = "header"
        self._written = ""  # the header with its markers, which is content if no message follows
        self._header = ""
        self._section = "role"
        self._kind: Channel = "content"

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""
        return self._kind if self._state == "body" else "content"

    def text(self, text: str) -> list[Part]:
        """A piece of a header or of a message."""
        if self._state == "body":
            return [self._piece(text)]
        if self._state == "between":
            if not text.strip():
                return []
            return self._reject(text)
        self._written += text
        self._header += text
        first = self._section == "role" and not self._written.startswith("<|start|>")
        bare = first and not (_START.startswith(self._header) or self._header.startswith(_START))
        if bare or len(self._header) > _LONGEST_HEADER:
            return self._reject("")
        return []

    def marker(self, marker: str) -> list[Part]:
        """Moves on to another part of a message."""
        parts: list[Part] = []
        # A model may forget the end of a message, or the start of the next one.
        if marker in (*_ENDS, "<|start|>") or (marker == "<|channel|>" and self._state == "body"):
            parts = self._end_message()
        if marker in _ENDS:
            return parts
        if marker == "<|start|>" or (self._state == "between" and marker == "<|channel|>"):
            self._state, self._written, self._header, self._section = "header", "", "", "role"
        if self._state != "header":
            return [*parts, *self.text(marker)]
        self._written += marker
        if marker == "<|message|>":
            return [*parts, *self._begin_message()]
        if marker != "<|start|>":
            self._section = marker
            self._header += f" {marker} "
        return parts

    def finish(self) -> list[Part]:
        """A header without a message, as content."""
        return self._end_message()

    def _begin_message(self) -> list[Part]:
        role, _, channel = self._header.partition("<|channel|>")
        recipient = _RECIPIENT.search(self._header)
        name = channel.split()[0] if channel.split() else ""
        self._state, self._written, self._kind = "body", "", "content"
        if recipient is not None and recipient[1].startswith("functions."):
            if self._tools:
                self._kind = "tool"
                self._calls += 1
                function = recipient[1].removeprefix("functions.")
                return [ToolCall(self._calls - 1, self._new_id(), function)]
        elif name == "analysis" or recipient is not None:  # of tools that the client does not know
            self._kind = "reasoning"
        return []

    def _piece(self, text: str) -> Part:
        if self._kind == "tool":
            return Arguments(self._calls - 1, text)
        return Reasoning(text) if self._kind == "reasoning" else Content(text)

    def _end_message(self) -> list[Part]:
        """Ends a message; a header without a message is content, unless it was merely cut off."""
        written, self._written = self._written, ""
        in_header, self._state = self._state == "header", "between"
        if not in_header or _BEGUN_HEADER.fullmatch(written):
            return []
        return [Content(written)]

    def _reject(self, text: str) -> list[Part]:
        """Takes what is no header for content."""
        written, self._written = self._written, ""
        self._state, self._kind = "body", "content"
        return [Content(written + text)]
