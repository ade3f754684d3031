"""Who may use the server: keys, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping

from serving.api.errors import BAD_REQUEST, ApiError


class Keys:
    """The keys that a request may bring."""

    def __init__(self, keys: frozenset[str]) -> None:
        # Hashes all have one length, so comparing them says nothing about a key's.
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in sorted(keys)]

    def owner(self, headers: Mapping[str, str]) -> str:
        """A short name for the key that a request brings; "" if no keys are needed.

        The time that this takes does not tell how much of a key was right.

        Raises:
          ApiError: 403 without a key, 401 with a wrong one.
        """
        if not self._hashes:
            return ""
        key = _key(headers.get("authorization", ""))
        if key is None:
            raise ApiError(
                403,
                "Not authenticated: send the header `Authorization: Bearer KEY`",
                "no_api_key",
                "api_key",
                BAD_REQUEST,
            )
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # all of them
        if not any(matches):
            raise ApiError(401, "Wrong API Key", "wrong_api_key", "api_key", BAD_REQUEST)
        return given.hex()[:8]


def _key(header: str) -> str | None:
    """The key in a header: after `Bearer`, or as the password of a browser's `Basic`."""
    scheme, _, value = header.strip().partition(" ")
    value = value.strip()
    if scheme.lower() == "bearer" and value:
        return value
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return None
