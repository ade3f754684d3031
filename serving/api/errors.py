"""What a client is told when a request fails: nested for one client, flat for the other.

Both real clients read `error` of a body if it is there, and else the body itself. Old tests and
scripts read the flat form. So every error has both.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from serving.request import PromptTooLong, QueueFull
from serving.session import GenerationCancelled, GenerationFailed
from wsekern.error_line import printable

_MOST_MESSAGE = 600  # bytes; the message stands twice in a body, which stays under 2 KB
_MOST_FIELD = 100
BAD_REQUEST = "invalid_request_error"
_KINDS = {
    404: "not_found_error",
    408: "request_timeout_error",
    429: "too_many_requests_error",
    500: "server_error",
    503: "server_error",
}


@dataclasses.dataclass
class ApiError(Exception):
    """A request that fails, with all that its answer says.

    Args:
      status: of the HTTP response.
      message: what is wrong, the value, and the mend.
      code: a short name that programs compare.
      param: the field that is wrong.
      kind: the answer's `type`; by default the usual one for the status.
      headers: further headers of the answer.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    kind: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"

    def fields(self, request_id: str) -> dict[str, Any]:
        """The error as an object, without the nesting."""
        return {
            "message": cut(self.message, _MOST_MESSAGE),
            "type": self.kind or _KINDS.get(self.status, BAD_REQUEST),
            "param": None if self.param is None else cut(self.param, _MOST_FIELD),
            "code": self.code,
            "id": request_id,
        }

    def body(self, request_id: str) -> bytes:
        """The answer's JSON, under 2 KB."""
        fields = self.fields(request_id)
        flat: dict[str, Any] = {"error": fields, **fields}
        if self.status == 403:
            flat["detail"] = "Not authenticated"
        return json.dumps(flat, ensure_ascii=False).encode()

    def event(self, request_id: str) -> dict[str, Any]:
        """The error as an event of a stream that has begun."""
        return {"status_code": self.status, "error": self.fields(request_id)}


def refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    """Raises the error for a field of a request that is wrong."""
    raise ApiError(400, message, code, param)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, GenerationFailed):
        return ApiError(500, f"the text cannot go on: {error}", "generation_failed")
    if isinstance(error, GenerationCancelled):
        return ApiError(503, str(error), "server_ending", headers={"retry-after": "2"})
    if isinstance(error, QueueFull):
        again = {"retry-after": "1", "x-should-retry": "true"}
        message = f"the queue is full: {error}" if str(error) else "the queue is full"
        return ApiError(429, message, "queue_exceeded", "queue", headers=again)
    if isinstance(error, PromptTooLong):
        return context_overflow(str(error))
    return ApiError(500, "the server has a fault; its log says more", "internal_error")


def context_overflow(message: str, param: str = "messages") -> ApiError:
    """The error for a prompt that leaves no room; to try again is of no use."""
    return ApiError(
        400, message, "context_length_exceeded", param, headers={"x-should-retry": "false"}
    )


def unknown_model(name: str) -> ApiError:
    """The error for a model that is not served."""
    return ApiError(
        404,
        f"Model {cut(name, 200)} does not exist or you do not have access to it.",
        "model_not_found",
        "model",
    )


def shown(value: Any) -> str:
    """A value of a request as JSON, short enough for a message."""
    if isinstance(value, str):
        return json.dumps(cut(value, 60), ensure_ascii=False)
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return f"a number of {value.bit_length():,} bits"  # its digits take time to find
    return json.dumps(value)


def cut(text: str, most: int) -> str:
    """The start of a text, printable, in at most `most` bytes of UTF-8 and JSON."""
    safe = printable(text[:most])
    encoded = json.dumps(safe, ensure_ascii=False).encode()[1:-1]
    if len(encoded) <= most and len(text) <= most:
        return safe
    while len(json.dumps(safe, ensure_ascii=False).encode()) > most:
        safe = safe[: int(len(safe) * 0.9)]
    return safe + "..."
