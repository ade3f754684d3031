"""Tool calls between `<tool_call>` and `</tool_call>`, as Hermes and Qwen write them.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from collections.abc import Callable

from serving.text.parsers.call import CallReader
from serving.text.parsers.parts import Channel, Content, Part, new_call_id

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKERS = (OPEN, CLOSE)


class HermesReader:
    """Separates tool calls from content; white space around them is markup."""

    def __init__(self, new_id: Callable[[], str] = new_call_id) -> None:
        self._new_id = new_id
        self._calls = 0  # that have begun
        self._call: CallReader | None = None
        self._skips = False  # white space after a call
        self._space = ""  # that is dropped if a call follows
        self._surplus = ""  # text between a call's object and its end; it is content

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""
        return "content" if self._call is None else "tool"

    def text(self, text: str) -> list[Part]:
        """A piece of the content or of a call."""
        if self._call is not None:
            return self._in_call(self._call, text)
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        text = self._space + text
        kept = len(text.rstrip())
        self._space = text[kept:]
        return [Content(text[:kept])]

    def marker(self, marker: str) -> list[Part]:
        """Begins or ends a call."""
        if marker not in MARKERS or (marker == CLOSE and self._call is None):
            return self.text(marker)
        parts = self._end_call(marker if marker == CLOSE else "")
        if marker == OPEN:
            self._call = CallReader(self._calls, self._new_id)
        return parts

    def finish(self) -> list[Part]:
        """What is held back still; a call that never began is content."""
        parts = self._end_call("")
        space, self._space = self._space, ""
        return [*parts, Content(space)]

    def _in_call(self, call: CallReader, text: str) -> list[Part]:
        if call.state != "reading":
            self._surplus += text
            return []
        begun = call.begun
        parts, rest = call.feed(text)
        if call.begun and not begun:
            self._calls += 1
            self._space = ""
        if call.state == "failed" and not call.begun:
            return [*parts, *self._reject(call, rest)]
        self._surplus = rest
        return parts

    def _end_call(self, end: str) -> list[Part]:
        """Ends the call that is being read, if any; one that never began is content."""
        if self._call is None:
            return []
        call = self._call
        parts = call.close()
        if not call.begun:
            return [*parts, *self._reject(call, end)]
        self._call, self._skips = None, True
        surplus, self._surplus = self._surplus, ""
        return [*parts, *(self.text(surplus) if surplus.strip() else [])]

    def _reject(self, call: CallReader, rest: str) -> list[Part]:
        """Takes what was no call for content, as it was written."""
        self._call, self._skips = None, False
        return self.text(OPEN + call.read + rest)
