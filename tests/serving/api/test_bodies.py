"""Bodies: JSON, gzip and MessagePack, and whatever else may come."""

import gzip
import json
from typing import Any

import httpx
import msgpack
import pytest

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
JSON = json.dumps(ASKED).encode()


def post(server, content, path="/v1/chat/completions", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(f"{server.url}{path}", content=content, headers=named)


def _zipped(body):
    """Equal bytes at any time: the bodies are in the names of tests."""
    return gzip.compress(body, mtime=0)


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (JSON, {}),
        (JSON, {"content_type": "application/json; charset=UTF-8"}),
        (_zipped(JSON), {"content_encoding": "gzip"}),
        (_zipped(JSON[:9]) + _zipped(JSON[9:]), {"content_encoding": "gzip"}),
        (msgpack.packb(ASKED), {"content_type": "application/msgpack"}),
        (
            _zipped(msgpack.packb(ASKED)),
            {"content_type": "application/vnd.msgpack", "content_encoding": "gzip"},
        ),
    ],
)
def test_bodies_that_are_read(server, content, headers):
    answer = post(server, content, **headers)
    assert answer.status_code == 200, answer.text


def with_text(text):
    return JSON.replace(b'"Hi"', text)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf" + JSON,
        with_text(b'"\xc3("'),
        with_text(b'"\\ud800"'),
        with_text(b'"a\\udc00\\ud800"'),
        with_text(b"NaN"),
        JSON[:-1] + b', "temperature": NaN}',
        JSON[:-1] + b', "temperature": -Infinity}',
        JSON[:-1] + b', "temperature": 1e999}',
        JSON[:-1] + b', "model": "scripted"}',
        JSON[:-1] + b', "seed": ' + b"9" * 5000 + b"}",
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": [' + b"1," * 1_000_001 + b"1]}",
        "gzip",
    ],
)
def test_bodies_that_are_no_objects_of_json(server, content):
    headers = {"content_encoding": "gzip"} if content == "gzip" else {}
    answer = post(server, content, **headers)
    assert answer.status_code == 400, answer.text
    assert len(answer.content) < 2048


@pytest.mark.parametrize(
    "value",
    [b"bytes", msgpack.Timestamp(1), msgpack.ExtType(5, b"x"), float("nan"), {1: 2}, {b"a": 1}],
)
def test_values_that_json_does_not_know(server, value):
    content = msgpack.packb(ASKED | {"user": value})
    assert post(server, content, content_type="application/msgpack").status_code == 400


@pytest.mark.parametrize(
    "content", [b"\xc1", b"\x81", b"\x81" * 100_000, b"\x91" * 100_000, b"\xdd\xff\xff\xff\xff"]
)
def test_bytes_that_are_not_messagepack(server, content):
    assert post(server, content, content_type="application/x-msgpack").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "text/plain"},
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_type": "application/json; charset=latin-1"},
        {"content_encoding": "br"},
        {"content_encoding": "gzip, gzip"},
    ],
)
def test_other_types_of_content(server, headers):
    answer = post(server, JSON, **headers)
    assert answer.status_code == 415 and answer.json()["error"]["code"]


def test_bodies_over_the_limit(serving, server):
    most = server.app.interface.settings.most_body
    answer = post(server, b"x" * (most + 1))
    assert answer.status_code == 413 and answer.headers["x-should-retry"] == "false"
    stream = (b"x" * 65_536 for _ in range(most // 65_536 + 2))  # without a content-length
    assert post(server, stream).status_code == 413


def test_a_little_gzip_that_becomes_much(server):
    bomb = gzip.compress(gzip.compress(b" " * 200_000_000))
    assert len(bomb) < 10_000
    once = gzip.decompress(bomb)
    answer = post(server, once, content_encoding="gzip")
    assert answer.status_code == 413


def test_gzip_of_very_many_members(server):
    assert post(server, gzip.compress(b"") * 10_000, content_encoding="gzip").status_code == 400
    cut = post(server, gzip.compress(JSON)[:-9], content_encoding="gzip")
    assert cut.status_code == 400 and "cut off" in cut.json()["message"]
