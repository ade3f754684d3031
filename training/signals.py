"""This file is how a run is stopped from outside: once to save first, twice at once."""

import os
import signal
import threading
from typing import Any

STOPPED = 75  # exit status of a run that saved and can be resumed (EX_TEMPFAIL)
KILLED = 130  # exit status after a Ctrl-C that ended it at once

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h\n"  # which a live line hides


class StopSignals:
    """While entered, notes SIGINT, SIGTERM and SIGHUP in `received` instead of dying of them.

    A second SIGINT ends the process at once, with status 130. Python delivers signals to the main
    thread alone: in another one, nothing is noted.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        here = threading.current_thread() is threading.main_thread()
        for number in _STOPS if here else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            _end(number, frame)  # threads that write a checkpoint would hold up an ordinary exit
        self.received = signal.Signals(number)
        _tell(b"\nstopping once what is done is saved; Ctrl-C again ends at once\n")


def end_at_once() -> None:
    """From here on, a signal ends the process with status 128 and its number, whatever it does."""
    for number in _STOPS:
        signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    if os.isatty(1):
        os.write(1, _SHOW_CURSOR)
    os._exit(128 + number)


def _tell(line: bytes) -> None:
    try:
        os.write(2, line)
    except OSError:
        pass  # nobody is there any more
