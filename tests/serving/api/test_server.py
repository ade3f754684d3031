"""How the server starts, drains and ends."""

import pathlib
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

from serving.api.server import HttpServer

ASKED: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}]}
PROGRAM = """
import sys, time
sys.path.insert(0, "tests")
from scripted_engine import ScriptedEngine, build_server
engine = ScriptedEngine(lambda prompt, params: b"x" * 30)
engine.pause = 0.05
server = build_server(engine, drain_seconds=float(sys.argv[1]))
print(server.port, flush=True)
sys.exit(server.run(lambda: time.sleep(float(sys.argv[2]))))
"""


def test_a_port_that_is_taken_says_so(server):
    with pytest.raises(OSError) as refusal:
        HttpServer(server.app, port=server.port)
    assert f"127.0.0.1:{server.port}" in str(refusal.value)


@pytest.fixture
def program():
    """Starts a server in a process of its own; its grace, and how long it loads, in seconds."""
    running: list[Any] = []

    def start(grace=5.0, load=0.0):
        process: Any = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(grace), str(load)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[3],
        )
        running.append(process)
        port = int(process.stdout.readline())
        return process, f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def stream_of(url, texts, chunks):
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=ASKED | {"stream": True}, timeout=20
    ) as answer:
        for line in answer.iter_lines():
            chunks.append(line)
    texts.append("\n".join(chunks))


@pytest.fixture
def streaming():
    """A stream that is read in a thread; its chunks so far, and its whole text at the end."""
    threads = []

    def start(url):
        texts, chunks = list[str](), list[str]()
        thread = threading.Thread(target=stream_of, args=(url, texts, chunks))
        thread.start()
        threads.append(thread)
        while len(chunks) < 6:
            time.sleep(0.01)
        return thread, texts

    yield start
    for thread in threads:
        thread.join(20)


@pytest.mark.slow
def test_running_requests_end_before_the_server_does(program, streaming):
    process, url = program()
    thread, texts = streaming(url)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    thread.join(20)
    assert texts[0].rstrip().endswith("data: [DONE]") and '"finish_reason":"stop"' in texts[0]
    assert process.wait(10) == 0, process.stderr.read()


@pytest.mark.slow
def test_after_the_grace_what_still_runs_is_told_so(program, streaming):
    process, url = program(grace=0.3)
    thread, texts = streaming(url)
    process.send_signal(signal.SIGTERM)
    thread.join(20)
    assert '"status_code":503' in texts[0] and "server_ending" in texts[0]
    assert process.wait(10) == 0, process.stderr.read()


@pytest.mark.slow
def test_a_second_signal_ends_the_server_at_once(program, streaming):
    process, url = program(grace=60)
    httpx.get(f"{url}/health")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process, url = program(grace=60)
    httpx.get(f"{url}/health")
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ASKED | {"stream": True}):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(1) == 128 + signal.SIGTERM
