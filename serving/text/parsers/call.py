"""Read one tool call, a JSON object with a name and arguments, as it is written."""

import json
from collections.abc import Callable, Collection
from typing import Literal

from serving.text.parsers.parts import Arguments, Part, ToolCall

_KEYS = ("name", "arguments", "parameters", "type", "id")
_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"
_CLOSES = {"{": "}", "[": "]"}
State = Literal["reading", "done", "failed"]


class CallReader:
    """Reads `{"name": .., "arguments": {..}}` character by character.

    The call begins when the name is known and the arguments have begun; from then on their pieces
    come out as they are written. Arguments may also be a text that holds JSON, null, or missing.

    Args:
      index: of the call in its answer.
      new_id: makes the call's id.
      names: of the tools there are; None: any name is taken.
    """

    def __init__(
        self, index: int, new_id: Callable[[], str], names: Collection[str] | None = None
    ) -> None:
        self._index = index
        self._new_id = new_id
        self._names = names
        self.state: State = "reading"
        self.begun = False
        self.read = ""  # all text taken until the call begins; it is content if none begins
        self._announced = False  # whether its ToolCall came out
        self._step = self._open
        self._key = ""
        self._value: list[str] = []
        self._name: str | None = None
        self._arguments = ""  # not written yet
        self._has_arguments = False
        self._stack: list[str] = []  # the brackets that are to come
        self._quoted = self._escaped = False

    def feed(self, text: str) -> tuple[list[Part], str]:
        """The parts that a text adds, and the rest of it after the object or a mistake."""
        taken = 0
        for character in text:
            self._step(character)
            if self.state == "failed":
                break
            taken += 1
            if not self.begun:
                self.read += character
                done = self.state == "done"
                self.begun = self._name is not None and (self._has_arguments or done)
            if self.state == "done":
                break
        return self._parts(), text[taken:]

    def close(self) -> list[Part]:
        """Ends a call whose last brackets are missing; it fails if it never began."""
        if self.state == "reading":
            self.state = "done" if self.begun else "failed"
        return self._parts()

    def _parts(self) -> list[Part]:
        if not self.begun:
            return []
        parts: list[Part] = []
        if not self._announced:
            self._announced = True
            parts.append(ToolCall(self._index, self._new_id(), self._name or ""))
            self._arguments = self._arguments if self._has_arguments else "{}"
        if self._arguments:
            parts.append(Arguments(self._index, self._arguments))
            self._arguments = ""
        return parts

    def _fail(self) -> None:
        self.state = "failed"

    def _open(self, character: str) -> None:
        if character == "{":
            self._step = self._before_key
        elif character not in _SPACE:
            self._fail()

    def _before_key(self, character: str) -> None:
        if character == '"':
            self._value, self._escaped = ['"'], False
            self._step = self._in_key
        elif character not in _SPACE:
            self._fail()

    def _in_key(self, character: str) -> None:
        if not self._string_ends(character):
            return
        self._key = _loads("".join(self._value)) or ""
        repeated = (self._key == "name" and self._name is not None) or (
            self._key in _ARGUMENTS and self._has_arguments
        )
        if repeated or self._key not in _KEYS:
            self._fail()
        self._step = self._colon

    def _colon(self, character: str) -> None:
        if character == ":":
            self._step = self._before_value
        elif character not in _SPACE:
            self._fail()

    def _before_value(self, character: str) -> None:
        if character in _SPACE:
            return
        self._value, self._stack = [character], []
        self._quoted = self._escaped = False
        if character in _CLOSES:
            self._stack = [_CLOSES[character]]
            self._step = self._in_brackets
            if self._key in _ARGUMENTS:
                self._arguments, self._has_arguments = character, True
                if character == "[":
                    self._fail()
            elif self._key == "name":
                self._fail()
        elif character == '"':
            self._step = self._in_string
        else:
            self._step = self._in_word

    def _in_brackets(self, character: str) -> None:
        if self._key in _ARGUMENTS:
            self._arguments += character
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._quoted = False
        elif character == '"':
            self._quoted = True
        elif character in _CLOSES:
            self._stack.append(_CLOSES[character])
        elif character in "}]":
            if character != self._stack.pop():
                if self._key in _ARGUMENTS:
                    self._arguments = self._arguments[:-1]
                self._fail()
            elif not self._stack:
                self._step = self._after_value

    def _in_string(self, character: str) -> None:
        if not self._string_ends(character):
            return
        value = _loads("".join(self._value))
        self._step = self._after_value
        if value is None:
            self._fail()
        elif self._key == "name":
            self._name = value
            if not value or (self._names is not None and value not in self._names):
                self._fail()
        elif self._key in _ARGUMENTS:
            self._arguments, self._has_arguments = value or "{}", True

    def _in_word(self, character: str) -> None:
        if character not in ",}" and character not in _SPACE:
            self._value.append(character)
            if len(self._value) > 32:
                self._fail()
            return
        word = "".join(self._value)
        if self._key in _ARGUMENTS and word == "null":
            self._arguments, self._has_arguments = "{}", True
        elif self._key in _ARGUMENTS or self._key == "name":
            self._fail()
            return
        self._step = self._after_value
        self._step(character)

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._step = self._before_key
        elif character == "}" and self._name is not None:
            self.state = "done"
        elif character not in _SPACE:
            self._fail()

    def _string_ends(self, character: str) -> bool:
        """Takes a character of a text in quotes; whether it is the last."""
        self._value.append(character)
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            return True
        return False


def _loads(text: str) -> str | None:
    """The text in quotes; None if it is no JSON."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
