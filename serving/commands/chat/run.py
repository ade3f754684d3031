"""The chat itself: lines in, answers out."""

import asyncio
import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import TextIO

from serving.commands.chat.arguments import ChatCommand
from serving.commands.chat.partner import LocalModel, Partner, Server
from serving.commands.http_client import Refused
from wsekern.error_line import error_line, without_controls

_HELP = """\
/reset         forget what was said
/system TEXT   set the system message; without TEXT, show it
/quit          end, as Ctrl-D does
Ctrl-C stops an answer; what it has said so far is kept."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def run(command: ChatCommand, restore_interrupt: Callable[[], None]) -> int:
    """Talks until the input ends; returns 0, or 1 if a message got no answer.

    Raises:
      ValueError: the model does not load, or the server lists none.
      OSError: no server or model is there.
      Refused: the server does not take the key.
    """
    # Until the model is loaded, Ctrl-C ends the process: no handler runs while XLA compiles.
    local = LocalModel(command) if command.is_local else None
    restore_interrupt()
    with asyncio.Runner() as runner:
        if local is not None:
            partner: Partner = local
        else:
            partner = server = Server(command)
            runner.run(server.find_model())
        try:
            return Chat(partner, runner, command.system).talk()
        finally:
            runner.run(partner.close())


class Chat:
    """A conversation.

    Args:
      partner: answers.
      runner: runs what is asynchronous; turns Ctrl-C into a cancellation.
      system: the system message; None: there is none.
    """

    def __init__(self, partner: Partner, runner: asyncio.Runner, system: str | None) -> None:
        self._partner, self._runner, self._system = partner, runner, system
        self._messages: list[dict[str, str]] = []
        self._status = 0

    def talk(self) -> int:
        """Answers lines until there are no more; returns the exit status."""
        if sys.stdin.isatty():
            _say(f"{self._partner.name}; /help says what else can be said, Ctrl-D ends")
        while True:
            try:
                line = _read_line()
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                _say("\nCtrl-D or /quit ends the chat")
                continue
            if line is None or line.strip() == "/quit":
                return self._status
            if line.startswith("/"):
                self._obey(line.strip())
            elif line.strip():
                self._send(line)

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._messages.clear()
            _say("forgotten")
        elif name == "/system":
            self._system = rest.strip() or self._system
            _say(f"system: {self._system or 'none'}")
        else:
            _say(_HELP if name == "/help" else f"{name} is no command\n{_HELP}")

    def _send(self, text: str) -> None:
        """Sends a message and shows the answer; a message without an answer is forgotten."""
        self._messages.append({"role": "user", "content": text})
        try:
            content = self._runner.run(self._show_answer())
        except (Refused, OSError) as error:
            _say(f"error: {error_line(error)}")
            self._status, content = 1, ""
        if content:
            self._messages.append({"role": "assistant", "content": content})
        else:
            self._messages.pop()

    async def _show_answer(self) -> str:
        """Writes an answer as it comes; returns its content, after Ctrl-C what there is of it."""
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        content, writer = "", _Writer()
        start, first, tokens, usage = time.monotonic(), None, 0, None
        is_stopped = False
        try:
            async with contextlib.aclosing(
                self._partner.answer([*system, *self._messages])
            ) as chunks:
                async for chunk in chunks:
                    usage = chunk.usage or usage
                    if chunk.has_text:
                        first = time.monotonic() if first is None else first
                        tokens += 1
                    content += chunk.content
                    writer.write(chunk.reasoning, chunk.content)
        except asyncio.CancelledError:
            is_stopped = True
        finally:
            writer.finish()
        tokens = (usage or {}).get("completion_tokens", tokens)
        now = time.monotonic()
        said = "stopped; " if is_stopped else ""
        said += f"{tokens} token{'s' if tokens != 1 else ''}"
        if first is not None:
            if tokens > 1 and now > first:
                said += f", {(tokens - 1) / (now - first):.1f} tokens/s"
            said += f", the first after {first - start:.2f} s"
        _say(said)
        return content


class _Writer:
    """Writes an answer: its content to standard output, its reasoning dimmed.

    A file or a program that reads standard output gets the content alone, and as the model says it;
    a terminal gets nothing that it would obey.
    """

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._reasoning: TextIO = sys.stdout if self._is_terminal else sys.stderr
        self._reasons = self._is_begun = False

    def write(self, reasoning: str, content: str) -> None:
        """Writes what comes next of both."""
        self._is_begun = self._is_begun or bool(reasoning or content)
        if reasoning:
            begin = _DIM if self._is_terminal and not self._reasons else ""
            self._reasons = True
            print(begin + without_controls(reasoning), end="", file=self._reasoning, flush=True)
        if content:
            self._end_reasoning()
            shown = without_controls(content) if self._is_terminal else content
            print(shown, end="", flush=True)

    def finish(self) -> None:
        """Ends the answer's last line, if there is one."""
        self._end_reasoning()
        if self._is_begun:
            print(flush=True)

    def _end_reasoning(self) -> None:
        if self._reasons:
            self._reasons = False
            end = f"{_PLAIN}\n" if self._is_terminal else "\n"
            print(end, end="\n", file=self._reasoning, flush=True)


def _read_line() -> str | None:
    """The next line of the input; None: there is none."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        if importlib.util.find_spec("readline"):
            importlib.import_module("readline")  # gives `input` arrow keys and a history
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.removesuffix("\n") if line else None


def _say(text: str) -> None:
    """Writes what is not of the answer."""
    is_dim = sys.stderr.isatty()
    print(f"{_DIM}{text}{_PLAIN}" if is_dim else text, file=sys.stderr, flush=True)
