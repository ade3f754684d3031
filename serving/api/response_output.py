"""The items of a response, and the events that tell how they come to be."""

import uuid
from typing import Any

from serving.api.chat import token_logprobs
from serving.session import Piece
from serving.text.model_text import ModelText
from serving.text.parsers.parts import Arguments, Content, Part, Reasoning, ToolCall

Event = dict[str, Any]


class ResponseOutput:
    """Makes items of the pieces of one text.

    Args:
      text: names tokens.
      logprobs: whether items have log-probabilities.
    """

    def __init__(self, text: ModelText, *, logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []
        self._text = text
        self._logprobs = logprobs
        self._is_open = False  # whether the last item is

    def feed(self, piece: Piece) -> list[Event]:
        """The events of a piece."""
        events: list[Event] = []
        logprobs = []
        if self._logprobs:
            logprobs = [token_logprobs(self._text, chosen) for chosen in piece.content]
        for part in piece.parts:
            events += self._take(part, logprobs)
            if isinstance(part, Content):
                logprobs = []  # told with the first of several
        return events

    def finish(self, status: str) -> list[Event]:
        """The events that end the last item.

        Args:
          status: "completed" or "incomplete".
        """
        if not self.items and status == "completed":
            return self._open("message") + self._close(status)
        return self._close(status)

    def _take(self, part: Part, logprobs: list[dict[str, Any]]) -> list[Event]:
        match part:
            case Content(text):
                events = self._open("message")
                content = self.items[-1]["content"][0]
                content["text"] += text
                if self._logprobs:
                    content["logprobs"] += logprobs
                delta = self._event("response.output_text.delta", content_index=0, delta=text)
                return [*events, delta | {"logprobs": logprobs}]
            case Reasoning(text):
                events = self._open("reasoning")
                self.items[-1]["content"][0]["text"] += text
                name = "response.reasoning_text.delta"
                return [*events, self._event(name, content_index=0, delta=text)]
            case ToolCall(_, id, name):
                return self._close("completed") + self._open("function_call", id, name)
            case Arguments(_, text):
                self.items[-1]["arguments"] += text
                return [self._event("response.function_call_arguments.delta", delta=text)]

    def _open(self, kind: str, call_id: str = "", name: str = "") -> list[Event]:
        """The events that begin an item, unless the last one is of this kind and open."""
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        events = self._close("completed")
        identity = {"id": f"{_PREFIXES[kind]}_{uuid.uuid4().hex}", "type": kind}
        item: dict[str, Any] = identity | {"status": "in_progress"}
        part: dict[str, Any] | None = None
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": []}
            if self._logprobs:
                part["logprobs"] = []
            item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": ""}
            item |= {"summary": [], "content": []}
        else:
            item |= {"call_id": call_id, "name": name, "arguments": ""}
        self.items.append(item)
        self._is_open = True
        added = _copied(item)
        events.append(self._event("response.output_item.added", item=added))
        if part is not None:
            item["content"] = [part]
            name = "response.content_part.added"
            events.append(self._event(name, content_index=0, part=dict(part)))
        return events

    def _close(self, status: str) -> list[Event]:
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        events = []
        if item["type"] == "function_call":
            name = "response.function_call_arguments.done"
            done = self._event(name, arguments=item["arguments"], name=item["name"])
            events.append(done)
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            done = self._event(f"response.{kind}.done", content_index=0, text=part["text"])
            if kind == "output_text":
                done["logprobs"] = part.get("logprobs", [])
            name = "response.content_part.done"
            events += [done, self._event(name, content_index=0, part=dict(part))]
        return [*events, self._event("response.output_item.done", item=_copied(item))]

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "output_index": len(self.items) - 1}
        if "item" not in fields:
            event["item_id"] = self.items[-1]["id"]
        return event | fields


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    if "content" not in item:
        return dict(item)
    return item | {"content": [dict(part) for part in item["content"]]}
