"""Keep the newest responses in memory, for `previous_response_id`."""

import collections
import dataclasses
import json
from typing import Any

from serving.api.errors import ApiError

_MOST_BYTES = 32 << 20  # of all that is kept


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response, and the conversation that it ends."""

    owner: str
    response: dict[str, Any]
    messages: list[dict[str, Any]]
    size: int


class StoredResponses:
    """The newest responses, by id."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._stored: collections.OrderedDict[str, Stored] = collections.OrderedDict()
        self._bytes = 0

    def add(self, owner: str, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keeps a response; the oldest ones make room for it."""
        size = len(json.dumps([response, messages]))
        self._stored[response["id"]] = Stored(owner, response, messages, size)
        self._bytes += size
        while self._stored and (len(self._stored) > self._most or self._bytes > _MOST_BYTES):
            _, oldest = self._stored.popitem(last=False)
            self._bytes -= oldest.size

    def find(self, owner: str, name: str, param: str) -> Stored:
        """A response of this owner.

        Raises:
          ApiError: 404; there is none, or no longer.
        """
        stored = self._stored.get(name)
        if stored is None or stored.owner != owner:
            raise ApiError(
                404,
                f"there is no response {name[:100]!r}; the server keeps the newest {self._most} of "
                "those with store, until it ends",
                "response_not_found",
                param,
            )
        return stored

    def remove(self, owner: str, name: str) -> None:
        """Forgets a response; ApiError 404: there is none."""
        self._bytes -= self.find(owner, name, "response_id").size
        del self._stored[name]
