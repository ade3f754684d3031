"""Stop a run from outside: the first signal saves, the second ends the process at once."""

import os
import signal
import threading
from typing import Any

STOPPED = 75  # exit status: stopped and saved, --resume goes on (EX_TEMPFAIL)
KILLED = 130  # exit status: ended at once by Ctrl-C

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h\n"  # the live progress line has hidden it


class StopSignals:
    """In a `with` block, records SIGINT, SIGTERM and SIGHUP in `received` instead of dying.

    A second SIGINT ends the process at once, with status 130. Python delivers signals to the main
    thread only: in another thread nothing is recorded.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()
        for number in _STOPS if main else ():
            self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            _end(
                number, frame
            )  # not sys.exit, which would wait for the thread that writes a checkpoint
        self.received = signal.Signals(number)
        _write_to_stderr(b"\nstopping once what is done is saved; Ctrl-C again ends at once\n")


def end_at_once() -> None:
    """From now on a signal ends the process at once, with status 128 + its number."""
    for number in _STOPS:
        signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
    os._exit(128 + number)


def _write_to_stderr(line: bytes) -> None:
    try:
        os.write(2, line)
    except OSError:
        pass  # the terminal is closed
