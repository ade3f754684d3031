"""Tool calls as Llama 3 writes them: bare JSON at the start of an answer, or after a marker.

<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}
"""

from collections.abc import Callable, Collection
from typing import Literal

from serving.text.parsers.call import CallReader
from serving.text.parsers.parts import Channel, Content, Part, new_call_id

TAG = "<|python_tag|>"
MARKERS = (TAG,)
_BETWEEN = "[],; \t\r\n"  # what may stand around several calls


class Llama3Reader:
    """Separates tool calls from content.

    JSON that calls none of the client's tools is content.

    Args:
      names: of the tools.
      new_id: makes the ids of calls.
    """

    def __init__(self, names: Collection[str], new_id: Callable[[], str] = new_call_id) -> None:
        self._names = names
        self._new_id = new_id
        self._calls = 0
        self._call: CallReader | None = None
        self._state: Literal["start", "call", "content"] = "start"
        self._held = ""  # text before a call, which is content if there is none

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""
        return "tool" if self._call is not None else "content"

    def text(self, text: str) -> list[Part]:
        """A piece of the content or of a call."""
        parts: list[Part] = []
        while text:
            if self._state == "content":
                return [*parts, Content(text)]
            if self._call is None:
                text = self._before_call(text)
            else:
                found, text = self._in_call(self._call, text)
                parts += found
        return parts

    def marker(self, marker: str) -> list[Part]:
        """Begins calls."""
        if marker != TAG:
            return self.text(marker)
        parts = self._end()
        self._state, self._held = "start", TAG
        return parts

    def finish(self) -> list[Part]:
        """What is held back still; a call that never began is content."""
        return self._end()

    def _before_call(self, text: str) -> str:
        """Looks for the beginning of a call; returns the text that is not read yet."""
        rest = text.lstrip(_BETWEEN if self._calls or self._held.strip() else "[ \t\r\n")
        self._held += text[: len(text) - len(rest)]
        if rest.startswith("{"):
            self._state, self._call = "call", CallReader(self._calls, self._new_id, self._names)
        elif rest:
            # After calls, what stood between them is markup.
            rest = self._take_held() + rest
            self._state = "content"
        return rest

    def _in_call(self, call: CallReader, text: str) -> tuple[list[Part], str]:
        begun = call.begun
        parts, rest = call.feed(text)
        if call.begun and not begun:
            self._calls += 1
            self._held = ""
        if call.state == "done":
            self._call, self._state = None, "start"
        elif call.state == "failed":
            self._call, self._state = None, "content"
            if not call.begun:
                rest = self._take_held() + call.read + rest
        return parts, rest

    def _take_held(self) -> str:
        held, self._held = self._held, ""
        return held.removeprefix(TAG) if held.startswith(TAG) else held

    def _end(self) -> list[Part]:
        call, self._call = self._call, None
        self._state = "content"
        if call is not None:
            parts = call.close()
            return parts if call.begun else [*parts, Content(self._take_held() + call.read)]
        held = self._take_held()
        return [Content(held)] if held and not self._calls else []
