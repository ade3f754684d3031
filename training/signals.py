"""This file is how a run is stopped from outside: once to save first, twice at once."""

import os
import signal
import threading
from typing import Any

STOPPED = 75  # exit status of a run that saved and can be resumed (EX_TEMPFAIL)
KILLED = 130  # exit status after a second Ctrl-C


class StopSignals:
    """While entered, notes SIGINT and SIGTERM in `received` instead of dying of them.

    A second SIGINT ends the process at once, with status 130. Python delivers signals to the main
    thread alone: in another one, nothing is noted.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        here = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if here else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            os._exit(KILLED)  # threads that write a checkpoint would hold up an ordinary exit
        self.received = signal.Signals(number)
        os.write(2, b"\nfinishing the step and saving; Ctrl-C again ends without saving\n")
