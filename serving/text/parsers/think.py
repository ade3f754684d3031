"""Reasoning between `<think>` and `</think>`, before an answer of any syntax."""

from serving.text.parsers.parts import Channel, Content, Part, Reader, Reasoning

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)


class ThinkReader:
    """Separates reasoning from the answer, which another reader takes.

    White space around the markers is markup.

    Args:
      answer: reads what follows the reasoning.
      opened: whether the prompt ends inside of the reasoning.
      raw: whether reasoning is content, with its markers.
    """

    def __init__(self, answer: Reader, *, opened: bool = False, raw: bool = False) -> None:
        self._answer = answer
        self._raw = raw
        self._reasons = opened
        self._skips = opened and not raw  # white space, until other text comes
        self._begun = opened  # whether the answer has any text yet
        self._held = ""  # white space that is dropped if a marker follows

    @property
    def channel(self) -> Channel:
        """What the next text is taken for."""
        return "reasoning" if self._reasons else self._answer.channel

    def text(self, text: str) -> list[Part]:
        """Reasoning, or what the answer's reader makes of the text."""
        if self._raw:
            self._begun = self._begun or bool(text.strip())
            return [Content(text)] if self._reasons else self._answer.text(text)
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        if self._reasons or not self._begun:
            text = self._held + text
            kept = len(text.rstrip()) if self._reasons or not text.strip() else len(text)
            self._held = text[kept:]
            text = text[:kept]
        if self._reasons:
            return [Reasoning(text)]
        self._begun = self._begun or bool(text)
        return self._answer.text(text) if text else []

    def marker(self, marker: str) -> list[Part]:
        """Begins or ends the reasoning; other markers are for the answer's reader."""
        if not self._reasons and marker == OPEN and not self._begun:
            self._reasons = self._begun = True
        elif self._reasons and marker == CLOSE:
            self._reasons = False
        elif self._reasons:
            # A tool call ends the reasoning too, if the model forgot to.
            if marker == OPEN:
                return self.text(marker)
            self._reasons, self._held = False, ""
            return self._answer.marker(marker)
        elif marker in MARKERS:
            return [*self._release(), *self._answer.text(marker)]
        else:
            return [*self._release(), *self._answer.marker(marker)]
        self._skips, self._held = not self._raw, ""
        return [Content(marker)] if self._raw else []

    def finish(self) -> list[Part]:
        """What the answer's reader holds back."""
        return [*self._release(), *self._answer.finish()]

    def _release(self) -> list[Part]:
        """The white space held back, when no marker of reasoning follows."""
        self._begun = True
        held, self._held = self._held, ""
        if not held:
            return []
        return [Reasoning(held)] if self._reasons else self._answer.text(held)
