"""Clients at the socket: slow ones, rude ones, and those that leave."""

import contextlib
import json
import re
import socket
import statistics
import time
from typing import Any

import httpx
import pytest
from scripted_engine import ScriptedEngine

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
SLOW: dict[str, Any] = {"header_time": 0.6, "body_time": 0.6, "keep_alive": 0.6, "send_time": 0.6}


@pytest.fixture(scope="module")
def strict(serving):
    """A server with little patience."""
    with serving(ScriptedEngine(lambda prompt, params: b"Hello"), **SLOW) as server:
        yield server


@pytest.fixture
def strict_engine(strict):
    engine = strict.app.interface.models.loaded["scripted"].engine
    engine.pause, engine.reply = 0.0, lambda prompt, params: b"Hello"
    return engine


@contextlib.contextmanager
def connected(server):
    with socket.create_connection((server.host, server.port), timeout=10) as sock:
        yield sock


def request(body, *headers, length=None, path="/v1/chat/completions"):
    content = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: x",
        "content-type: application/json",
        f"content-length: {len(content) if length is None else length}",
        *headers,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), content


def read_all(sock):
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := sock.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def read_answer(sock):
    """One answer of a connection that stays open."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += sock.recv(65_536)
    head, _, body = said.partition(b"\r\n\r\n")
    (length,) = re.findall(rb"content-length: (\d+)", head)
    while len(body) < int(length):
        body += sock.recv(65_536)
    return head


def wait_until(is_so, seconds=5.0):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it does not come true"
        time.sleep(0.01)


def drip(sock, content, pause=0.05):
    """Sends a byte at a time until the server closes; returns what it says."""
    sock.settimeout(pause)
    for place in range(len(content)):
        try:
            sock.sendall(content[place : place + 1])
            said = sock.recv(65_536)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
        sock.settimeout(10)
        return said + read_all(sock)
    raise AssertionError("the server took it all")


def test_half_a_header_is_cut_while_others_are_served(strict):
    with connected(strict) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        assert httpx.post(f"{strict.url}/v1/chat/completions", json=ASKED).status_code == 200
        start = time.monotonic()
        assert b" 408 " in read_all(sock)
        assert time.monotonic() - start < 3


def test_a_header_a_byte_at_a_time(strict):
    with connected(strict) as sock:
        head, _ = request(ASKED, "x-long: " + "x" * 200)
        assert b" 408 " in drip(sock, head)


def test_a_body_a_byte_at_a_time(strict):
    with connected(strict) as sock:
        head, content = request(ASKED, length=1000)
        sock.sendall(head)
        assert b" 408 " in drip(sock, content.ljust(1000))


def test_a_body_for_a_route_that_reads_none(strict):
    with connected(strict) as sock:
        head, content = request(ASKED, length=100_000, path="/nope")
        sock.sendall(head)
        assert b" 404 " in drip(sock, content.ljust(1000))


def test_a_second_request_of_a_connection_must_come_as_fast(strict):
    with connected(strict) as sock:
        sock.sendall(b"".join(request(ASKED)))
        assert b" 200 " in read_answer(sock)
        assert b" 408 " in drip(sock, request(ASKED, "x-long: " + "x" * 200)[0])


def test_a_connection_that_says_nothing_is_closed(strict):
    with connected(strict) as sock:
        assert read_all(sock) == b""


def test_a_connection_is_kept_for_the_next_request(strict):
    with connected(strict) as sock:
        for _ in range(3):
            sock.sendall(b"".join(request(ASKED)))
            assert b" 200 " in read_answer(sock)
        assert read_all(sock) == b""  # and then closed


def test_a_slow_answer_is_no_slow_request(strict, strict_engine):
    strict_engine.pause = 0.4
    answer = httpx.post(f"{strict.url}/v1/chat/completions", json=ASKED, timeout=20)
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(strict, strict_engine, stream):
    strict_engine.pause, strict_engine.reply = 0.05, lambda prompt, params: b"x" * 1000
    with connected(strict) as sock:
        sock.sendall(b"".join(request(ASKED | {"stream": stream, "n": 2})))
        wait_until(lambda: len(strict_engine.running) == 2)
    start = time.monotonic()
    wait_until(lambda: not strict_engine.running)
    assert time.monotonic() - start < 0.5


def test_a_client_that_leaves_after_its_next_request_is_seen_too(strict, strict_engine):
    strict_engine.pause, strict_engine.reply = 0.05, lambda prompt, params: b"x" * 1000
    with connected(strict) as sock:
        sock.sendall(b"".join(request(ASKED)) * 2)
        wait_until(lambda: strict_engine.running)
    start = time.monotonic()
    wait_until(lambda: not strict_engine.running)
    assert time.monotonic() - start < 0.5


def test_requests_that_come_ahead_are_answered_in_turn_unless_they_are_too_many(server):
    with connected(server) as sock:
        sock.sendall(b"".join(request(ASKED)) * 3)
        said = b""
        while said.count(b"Hello there") < 3:
            said += sock.recv(65_536)
    with connected(server) as sock:
        head, content = request(ASKED | {"max_tokens": 1}, "x: " + "y" * 1000)
        server_engine(server).pause = 0.5
        with contextlib.suppress(ConnectionError):
            sock.sendall((head + content) * 1000)
        assert read_all(sock).count(b" 200 ") < 10


def server_engine(server):
    return server.app.interface.models.loaded["scripted"].engine


def test_a_client_that_does_not_read_is_cut(strict, strict_engine):
    strict_engine.reply = lambda prompt, params: b"x" * 3000
    with connected(strict) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = ASKED | {"stream": True, "n": 8, "logprobs": True, "top_logprobs": 20}
        sock.sendall(b"".join(request(body)))
        wait_until(lambda: strict_engine.running)
        wait_until(lambda: not strict_engine.running, 10)
        wait_until(lambda: not strict.connections, 10)


def test_too_many_headers_and_too_long_ones(server):
    many = {f"x-{i}": "1" for i in range(101)}
    assert httpx.get(f"{server.url}/health", headers=many).status_code == 431
    long = {f"x-{i}": "1" * 4000 for i in range(9)}
    assert httpx.get(f"{server.url}/health", headers=long).status_code == 431
    answer = httpx.get(f"{server.url}/health", headers={"x": "1" * 200_000})
    assert answer.status_code == 431 and answer.json()["error"]["code"]


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http(server, content):
    with connected(server) as sock:
        sock.sendall(content)
        assert b" 400 " in read_all(sock)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_more_connections_than_are_allowed(serving):
    engine = ScriptedEngine(lambda prompt, params: b"Hello")
    with serving(engine, most_connections=2) as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(server))
        time.sleep(0.1)
        with connected(server) as sock:
            assert b" 503 " in read_all(sock)
        stack.close()
        wait_until(lambda: not server.connections)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_answers_do_not_wait_for_the_client_to_confirm_their_first_part(server):
    times = []
    with httpx.Client() as client:
        for _ in range(15):
            times.append(client.get(f"{server.url}/v1/models").elapsed.total_seconds())
    assert statistics.median(times) < 0.03
