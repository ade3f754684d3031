"""Stop a run from outside: the first signal saves, the second Ctrl-C ends the process at once.

While XLA compiles or computes, for minutes perhaps, Python runs no handler. So the command has a
thread of its own for signals: see `wsekern.interrupts`.
"""

import contextlib
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from training.run_folder import saved_steps
from wsekern.interrupts import INTERRUPTED, do_nothing, watch_signals

STOPPED = 75  # exit status: stopped and saved, --resume goes on (EX_TEMPFAIL)
KILLED = INTERRUPTED

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h\n"  # the live progress line has hidden it


class StopSignals:
    """In a `with` block, records SIGINT, SIGTERM and SIGHUP in `received` instead of dying.

    A second SIGINT ends the process at once, with status 130. Python delivers signals to the main
    thread only: in another thread nothing is recorded.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._answered = False  # the first signal
        self._doing: str | None = None  # work that a signal ends at once
        self._resumable: Callable[[], bool] = lambda: False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        main = threading.current_thread() is threading.main_thread()
        for number in _stops() if main else ():
            self._handlers[number] = signal.signal(number, self._record)
        if self._handlers and _thread is not None:
            _thread.answer = self.answer
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handlers and _thread is not None:
            _thread.answer = None
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def end_at_once(self, doing: str, resumable: Callable[[], bool]) -> Iterator[None]:
        """While the block runs, a signal ends the process at once: there is nothing to save.

        The status is 75 if `resumable`, else 128 + the signal's number. This is so in the command
        alone. A program that trains and does more is not ended: its signals are recorded.

        Args:
          doing: what the block does, for the message, such as "compiling".
          resumable: whether --resume has anything to go on from; asked when the signal comes.
        """
        self._resumable, self._doing = resumable, doing
        if self.received is not None and _thread is not None:
            self._end_what_is_done(self.received)
        try:
            yield
        finally:
            self._doing = None

    def answer(self, number: int) -> None:
        """Does what a signal asks for; called once for each, by the thread if there is one."""
        first, self._answered = not self._answered, True
        self.received = self.received or signal.Signals(number)
        if not first and number == signal.SIGINT:
            _end(number)  # not sys.exit, which would wait for the thread that writes a checkpoint
        if self._doing is not None and _thread is not None:
            self._end_what_is_done(number)
        if first:
            _write_to_stderr("stopping once what is done is saved; Ctrl-C again ends at once")

    def _record(self, number: int, frame: object) -> None:
        if _thread is None:
            self.answer(number)
        else:  # which answers; but the main thread may ask for `received` before it does
            self.received = self.received or signal.Signals(number)

    def _end_what_is_done(self, number: int) -> None:
        resumable = self._resumable()
        rest = "go on with --resume" if resumable else "nothing was saved yet"
        _write_to_stderr(f"stopped by {signal.Signals(number).name} while {self._doing}; {rest}")
        _end(number, STOPPED if resumable else None)


class _SignalThread:
    """Answers each signal at once, whatever the main thread does."""

    def __init__(self) -> None:
        self.run_dir: pathlib.Path | None = None
        self.answer: Callable[[int], None] | None = None  # None: end at once
        watch_signals(self._answer)

    def _answer(self, number: int) -> None:
        if number not in _STOPS:
            return
        if self.answer is not None:
            self.answer(number)
        else:
            resumable = self.run_dir is not None and bool(saved_steps(self.run_dir))
            rest = "; go on with --resume" if resumable else ""
            _write_to_stderr(f"stopped by {signal.Signals(number).name}{rest}")
            _end(number, STOPPED if resumable else None)


_thread: _SignalThread | None = None  # the command's; None: another program trains


def end_at_once(run_dir: pathlib.Path | None = None) -> None:
    """From now on a signal ends the process at once, whatever it computes; for the command alone.

    The status is 75 if `run_dir` holds a checkpoint, which --resume can go on from, and else 128 +
    the signal's number.
    """
    global _thread
    if _thread is None:
        for number in _stops():
            signal.signal(number, do_nothing)  # the thread does all
        _thread = _SignalThread()
    _thread.run_dir = run_dir


def _stops() -> list[signal.Signals]:
    # Under nohup a hangup is ignored, and shall be.
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in _STOPS if not (ignored and number == signal.SIGHUP)]


def _end(number: int, status: int | None = None) -> None:
    if os.isatty(1):
        with contextlib.suppress(OSError):
            os.write(1, _SHOW_CURSOR)
    os._exit(128 + number if status is None else status)


def _write_to_stderr(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal is closed
        os.write(2, f"\n{line}\n".encode())
