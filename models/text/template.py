"""Render a checkpoint's chat template: Jinja, in a sandbox, in a process with limits.

A template comes with a checkpoint, from strangers. Python cannot be kept from computing
`10 ** 10 ** 9` or `'a' * 10 ** 9` once it has begun, so another process renders: the kernel ends it
when its time or its memory is used up. It starts with the first template, and renders the next ones
too. `models.text.template_worker` is its program.
"""

import atexit
import contextlib
import dataclasses
import importlib.util
import marshal
import os
import pathlib
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from models.checkpoints.json_file import shown
from wsekern.error_line import printable

SOURCE = 1_000_000  # characters of a template
NAMES = 50_000_000  # bytes of its variables
SECONDS = 2.0  # processor time of one rendering
MEMORY = 256 << 20  # bytes that rendering may take
OUTPUT = 10_000_000  # characters of a rendered chat
_PATIENCE = 20.0  # seconds, by the clock, on a machine that is busy with other things

# A request is a header and `marshal`'s bytes of (template, names); an answer is a header and text.
# The header has a letter and a length in bytes.
HEADER = struct.Struct("<cQ")
REQUEST, TEXT, ERROR = b"?", b"+", b"-"
LAST_ERROR = b"!"  # after which the process ends, since its memory is used up
_PROGRAM = (
    "import sys; sys.path += sys.argv[1:]; from models.text.template_worker import main; main()"
)


def render(template: str, names: dict[str, Any], source: str = "") -> str:
    """The text of a chat, rendered as `transformers` does.

    Whatever the template does, it ends: a template has at most 1,000,000 characters and its
    variables 50 MB, it may take 2 s of processor time and 256 MB of memory (the memory is limited
    on Linux alone), and its text has at most 10,000,000 characters.

    Args:
      template: Jinja; the sandbox lets it read `names`, but change nothing and reach nothing else.
      names: the template's variables: messages, tools, add_generation_prompt, bos_token, ...
      source: where the template is from, for error messages.

    Raises:
      ValueError: jinja2 is not installed, the template is invalid or fails or passes a limit, or
        a variable holds something else than texts, numbers, lists and dicts.
    """
    where = f"the chat template{f' of {source}' if source else ''}"
    if not isinstance(template, str):
        raise ValueError(f"{where} is {shown(template)}; it must be a text")
    if len(template) > SOURCE:
        raise ValueError(f"{where} has {len(template):,} characters; at most {SOURCE:,} are read")
    request = marshal.dumps((template, plain_data(names, where)))
    if len(request) > NAMES:
        raise ValueError(f"{where} gets {len(request):,} bytes; at most {NAMES:,} are rendered")
    with _lock:
        letter, text = _worker.ask(request)
    if letter != TEXT:
        raise ValueError(f"{where} fails: {printable(text)}")
    return text


def plain_data(value: Any, where: str) -> Any:
    """`value` as texts, numbers, lists and dicts alone, which have no methods of their own.

    Args:
      value: mappings, dataclasses, pydantic models and scalars of NumPy are converted.
      where: what `value` is, for error messages.

    Raises:
      ValueError: something in it cannot be converted, or it is nested too deeply.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise ValueError(f"{where} gets a value that is nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"{where} cannot get {error}") from None


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, bool, int, float):
        return value
    # Subclasses, such as enums and scalars of NumPy, have methods of their own.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _plain(dump())
    if callable(item := getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        return _plain(item())
    kind = type(value)
    raise TypeError(
        f"a {kind.__module__}.{kind.__qualname__}; give texts, numbers, lists and dicts"
    )


class _Worker:
    """The process that renders; another one takes its place when it has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> tuple[bytes, str]:
        """An answer's letter and text.

        Raises:
          ValueError: jinja2 is not installed, or no process can be started.
        """
        process = self._process = self._process or _start()
        late = threading.Timer(_PATIENCE, process.kill)
        late.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(HEADER.pack(REQUEST, len(request)) + request)
                process.stdin.flush()
            header = process.stdout.read(HEADER.size)
            if len(header) == HEADER.size:
                letter, size = HEADER.unpack(header)
                # A character takes up to four bytes. A process that says otherwise is not ours.
                content = process.stdout.read(size) if size <= 4 * OUTPUT else b""
                if len(content) == size:
                    if letter == LAST_ERROR:
                        self.stop()
                    return letter, content.decode(errors="surrogatepass")
        except BaseException:  # such as Ctrl-C: an answer may be left over
            self.stop()
            raise
        finally:
            late.cancel()
        return ERROR, _reason(self.stop())

    def stop(self) -> int:
        """Ends the process; returns its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)  # without requests it ends by itself, unless it is busy
        process.kill()
        return process.wait()

    def forget(self) -> None:
        """Leaves the process to the parent, from which this process was forked."""
        if self._process is not None:
            self._process.returncode = 0  # there is nothing for this process to wait for
        self._process = None


def _start() -> "subprocess.Popen[bytes]":
    paths = [str(pathlib.Path(__file__).parents[2])]
    for package in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(
                "chat templates need jinja2; in the checkout, run "
                "`pip install -e '.[hf]' -c constraints.txt`"
            )
        paths.append(str(pathlib.Path(spec.origin).parents[1]))
    # Nothing of this process's environment is for a template to see, but for the local time.
    kept = {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ}
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, *dict.fromkeys(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
        )
    except OSError as error:
        raise ValueError(f"no process can be started for chat templates: {error}") from error


def _reason(status: int) -> str:
    """Why a process with this exit status gave no answer."""
    if status == -signal.SIGPROF:
        return f"it takes more than {SECONDS:g} s of processor time"
    if status == -signal.SIGKILL:
        return f"it does not end within {_PATIENCE:g} s"
    return f"it ends its process, with status {status}; it may take {MEMORY >> 20} MB"


_worker = _Worker()
_lock = threading.Lock()
atexit.register(_worker.stop)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # it may have been held by a thread that is not in this process
    _worker.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
