"""Read the body of a request: JSON or MessagePack, perhaps gzipped, bounded in every respect."""

import asyncio
import collections
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import msgpack
from starlette.requests import Request

from serving.api.errors import ApiError

_DEEPEST = 200  # lists and objects within each other
_MOST_VALUES = 1_000_000  # of a body; each takes some 60 bytes
_SMALL = 64 << 10  # bytes that the event loop parses by itself
_MOST_MEMBERS = 64  # of gzip; what follows each is copied
_MSGPACK = {"application/msgpack", "application/vnd.msgpack", "application/x-msgpack"}


async def read_object(request: Request, most: int) -> dict[str, Any]:
    """The object in a request's body.

    Args:
      request: its content type says what the body is; JSON if it says nothing.
      most: the most bytes of the body, before and after it is decompressed.

    Raises:
      ApiError: 413, 415 or 400.
      ClientDisconnect: the client is gone.
    """
    kind = _content_type(request.headers)
    encodings = request.headers.get("content-encoding", "identity").strip().lower()
    if encodings not in ("identity", "gzip", "x-gzip", ""):
        raise ApiError(
            415,
            f"content-encoding {encodings!r} is not supported; send gzip, or none",
            "unsupported_encoding",
            "content-encoding",
        )
    content = await _read(request, most)
    if encodings.endswith("gzip"):
        content = await asyncio.to_thread(_gunzip, content, most)
    parse = _parse_msgpack if kind in _MSGPACK else _parse_json
    if len(content) <= _SMALL:
        return parse(content)
    return await asyncio.to_thread(parse, content)


def _content_type(headers: Mapping[str, str]) -> str:
    kind, _, options = headers.get("content-type", "application/json").partition(";")
    kind, options = kind.strip().lower(), options.strip().lower().replace('"', "")
    charset_is_known = options in ("", "charset=utf-8", "charset=utf8")
    if (kind != "application/json" and kind not in _MSGPACK) or not charset_is_known:
        raise ApiError(
            415,
            "the content type must be application/json in UTF-8, or application/msgpack",
            "unsupported_media_type",
            "content-type",
        )
    return kind


async def _read(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "0")
    if length.isascii() and length.isdigit() and int(length[:18]) > most:
        raise _too_large(most)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _too_large(most)
        parts.append(part)
    return b"".join(parts)


def _gunzip(content: bytes, most: int) -> bytes:
    """The content of one gzip member, or of several, of which no more than `most` is made."""
    parts: list[bytes] = []
    size = 0
    while content:
        if len(parts) == _MOST_MEMBERS:
            raise _malformed(f"the body's gzip has more than {_MOST_MEMBERS} members")
        member = zlib.decompressobj(wbits=31)
        try:
            part = member.decompress(content, most + 1 - size)
        except zlib.error as error:
            raise _malformed(f"the body is not gzip: {error}") from None
        size += len(part)
        if size > most:
            raise _too_large(most)
        if not member.eof:
            raise _malformed("the body's gzip is cut off")
        parts.append(part)
        content = member.unused_data
    return b"".join(parts)


def _parse_json(content: bytes) -> dict[str, Any]:
    if content.count(b",") > _MOST_VALUES:
        raise _malformed(f"the body has more than {_MOST_VALUES:,} values")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _malformed(f"the body is not UTF-8, at byte {error.start:,}") from None
    try:
        value = json.loads(text, object_pairs_hook=_pairs, parse_constant=_no_constant)
    except RecursionError:
        raise _malformed(f"the body is nested more than {_DEEPEST} deep") from None
    except ValueError as error:  # a number of 5,000 digits too
        raise _malformed(f"the body is not JSON: {error}") from None
    return _checked(value)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise ApiError(400, f"the body has {twice[:60]!r} twice", "malformed_body", twice)
    return names


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _parse_msgpack(content: bytes) -> dict[str, Any]:
    try:
        value = msgpack.unpackb(
            content,
            strict_map_key=True,
            max_array_len=_MOST_VALUES,
            max_map_len=_MOST_VALUES,
            object_pairs_hook=_pairs,
        )
    except (ValueError, msgpack.UnpackException, RecursionError, TypeError) as error:
        raise _malformed(f"the body is not MessagePack: {str(error)[:100]}") from None
    return _checked(value)


def _checked(value: Any) -> dict[str, Any]:
    """`value` if it is an object of JSON's own types, of which every text can be encoded."""
    waiting, seen = [(value, 1)], 0
    while waiting:
        one, depth = waiting.pop()
        seen += 1
        if depth > _DEEPEST:
            raise _malformed(f"the body is nested more than {_DEEPEST} deep")
        if isinstance(one, dict):
            for name in one:
                if not isinstance(name, str):  # MessagePack allows bytes
                    raise _malformed("the body has an object with a name that is no text")
                _check_text(name)
            waiting += [(item, depth + 1) for item in one.values()]
        elif isinstance(one, list):
            waiting += [(item, depth + 1) for item in one]
        elif isinstance(one, str):
            _check_text(one)
        elif isinstance(one, float):
            if not math.isfinite(one):
                raise _malformed(f"the body has the number {one}, which JSON does not know")
        elif one is not None and not isinstance(one, int):  # bool is an int
            raise _malformed(f"the body has a value of the type {type(one).__name__}")
        if seen + len(waiting) > 2 * _MOST_VALUES:
            raise _malformed(f"the body has more than {_MOST_VALUES:,} values")
    if not isinstance(value, dict):
        raise _malformed("the body must be an object")
    return value


def _check_text(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _malformed(
            f"the body has {text[error.start]!r}, half a surrogate pair, which is no character"
        ) from None


def _malformed(message: str) -> ApiError:
    return ApiError(400, message, "malformed_body")


def _too_large(most: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {most:,} bytes; send less",
        "request_too_large",
        headers={"x-should-retry": "false"},
    )
