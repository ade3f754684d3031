"""A chat by pipe and in a terminal, with a server and with a model of its own."""

import asyncio
import io
import os
import pty
import select
import subprocess
import sys
import time

import jax
import pytest
from flax import nnx

import models
from models.config import DecoderConfig
from serving.__main__ import main
from serving.commands.chat.run import Chat
from serving.commands.chunks import Chunk

CONFIG = DecoderConfig(
    vocab=256, d_model=32, d_ff=64, layers=1, heads=2, kv_heads=1, context=256, tied=True
)
# Makes its input the terminal of a session of its own, where \x03 is Ctrl-C.
IN_TERMINAL = """
import os, sys
os.login_tty(0)
os.execv(sys.executable, [sys.executable, "-m", "serving", "chat", *sys.argv[1:]])
"""


@pytest.fixture
def chat(monkeypatch, capsys):
    """Runs a chat on some lines; its exit status, and what it wrote to both outputs."""

    def run(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = main(["chat", *flags])
        return status, *capsys.readouterr()

    return run


def test_a_pipe_gets_the_answers_and_nothing_else(chat, server, engine):
    lines = "One\n\n/system Be brief.\nTwo\n/reset\nThree"
    status, out, error = chat(lines, "--url", server.url, "--max-tokens", "4")
    assert (status, out) == (0, "Some\nSome\nSome\n")
    prompts = [bytes(prompt).decode() for prompt, _ in engine.asked]
    assert prompts == [
        "user: One\nassistant:",
        "system: Be brief.\nuser: One\nassistant: Some\nuser: Two\nassistant:",
        "system: Be brief.\nuser: Three\nassistant:",
    ]
    assert all(params.max_tokens == 4 for _, params in engine.asked)
    assert error.count("4 tokens, ") == 3 and "forgotten" in error


def test_fields_and_quit(chat, server, engine):
    flags = ["--url", server.url, "--temperature", "0.5", "--seed", "7", "--system", "S"]
    status, _, error = chat("/what\n/help\nHi\n/system\n/quit\nNo more\n", *flags)
    assert status == 0
    ((prompt, params),) = engine.asked
    assert bytes(prompt) == b"system: S\nuser: Hi\nassistant:"
    assert (params.temperature, params.seed) == (0.5, 7)
    assert "/what is no command" in error and "system: S\n" in error


def test_a_message_without_an_answer_is_forgotten(chat, server, engine):
    replies = iter([b"", b"Yes"])
    engine.reply = lambda prompt, params: next(replies)
    status, out, error = chat("One\nTwo\n", "--url", server.url)
    assert (status, out) == (0, "Yes\n") and "0 tokens\n" in error
    assert bytes(engine.asked[1][0]) == b"user: Two\nassistant:"
    engine.queue_is_full = True
    status, out, error = chat("One\nTwo\n", "--url", server.url)
    assert (status, out) == (1, "") and error.count("error: 429: the queue is full") == 2


def test_a_server_that_counts_no_tokens(chat, plain_server):
    status, out, error = chat("Hi\n", "--url", plain_server.url)
    assert (status, out) == (0, "abc\n") and error.startswith("3 tokens")


class Partner:
    name = "scripted"

    async def answer(self, messages):
        for chunk in (Chunk(reasoning="Hm"), Chunk(reasoning="m"), Chunk("Yes\x1b[2J")):
            yield chunk

    async def close(self):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_reasoning_is_dimmed_and_a_terminal_obeys_no_model(is_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    with asyncio.Runner() as runner:
        assert Chat(Partner(), runner, None).talk() == 0
    out, error = capsys.readouterr()
    if is_terminal:
        assert out == "\x1b[2mHmm\x1b[0m\n\nYes\\x1b[2J\n"
    else:
        assert out == "Yes\x1b[2J\n" and error.startswith("Hmm\n\n")


@pytest.fixture
def terminal():
    """Starts a chat in a terminal; what it shows until some words, and a way to type."""
    primary, secondary = pty.openpty()
    running: list[subprocess.Popen] = []

    def start(*flags):
        one = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *flags],
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
        )
        running.append(one)
        return one

    def read_until(words):
        shown, end = "", time.monotonic() + 30
        while words not in shown:
            assert select.select([primary], [], [], max(0.0, end - time.monotonic()))[0], shown
            shown += os.read(primary, 4096).decode()
        return shown

    yield start, read_until, lambda text: os.write(primary, text.encode())
    for one in running:
        one.kill()
        one.wait()
    os.close(primary)
    os.close(secondary)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_ctrl_d_the_chat(terminal, server, engine):
    engine.pause = 0.02
    start, read_until, type_text = terminal
    process = start("--url", server.url)
    read_until("> ")
    type_text("Hi\n")
    read_until("Some words")
    type_text("\x03")
    assert "tokens/s" in read_until("> ").partition("stopped; ")[2]
    while engine.running:
        time.sleep(0.01)
    # A Ctrl-C between readline's prompt and its wait for input is seen with the next key only.
    time.sleep(0.5)
    type_text("\x03")
    read_until("Ctrl-D or /quit ends")
    type_text("More\n")
    read_until("Some")
    assert b"\nassistant: Some words" in bytes(engine.asked[1][0])  # what was shown is kept
    type_text("\x03")
    read_until("> ")
    type_text("\x04")
    assert process.wait(30) == 0


@pytest.mark.slow
def test_a_model_in_this_process(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models.save(jax.jit(lambda: models.Decoder(CONFIG, rngs=nnx.Rngs(0)))(), tmp_path / "tiny")
    flags = ["--model", str(tmp_path / "tiny"), "--platform", "cpu", "--temperature", "0"]
    status, out, error = chat("Hi\n", *flags, "--max-tokens", "5")
    assert status == 0 and out.strip() and "5 tokens" in error
    status, _, error = chat("x" * 300 + "\n", *flags)
    assert status == 1 and "error: 400: " in error and "256" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "0"], "max_tokens=0 must be 1 or more"),
        (["--temperature", "-1"], "temperature=-1.0 must be 0 or more"),
        (["--url", "http://a", "--weights", "int8"], "weights is of a model that this process"),
    ],
)
def test_refuses_arguments(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(["chat", *flags])
    assert end.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
        (["--model", "/nowhere"], "/nowhere: no such folder or file"),
    ],
)
def test_refuses(flags, message, chat):
    status, _, error = chat("", *flags)
    assert status == 2 and error.startswith("python -m serving chat: error: ") and message in error
