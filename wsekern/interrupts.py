"""End a command at Ctrl-C: at once, with one line and status 130.

Python runs its handlers in the main thread, between two instructions. While XLA compiles or
computes there is no such moment, and what a handler raises there or in an import may be swallowed,
or end in a crash. So a thread of its own waits for signals: the system's handler wakes it through
a pipe, whatever the main thread does.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from wsekern.atomic_write import remove_partial_files

INTERRUPTED = 130  # exit status


def end_at_interrupt(program: str) -> Callable[[], None]:
    """From now on Ctrl-C ends the process at once: prints "PROGRAM: interrupted", status 130.

    Files that are half written are removed. Where SIGINT is ignored, as under nohup, it stays so,
    and in another thread than the main one nothing changes.

    Args:
      program: the name of the command.

    Returns:
      A function that makes Ctrl-C mean again what it did.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        return lambda: None

    def end(number: int) -> None:
        if number == signal.SIGINT:
            remove_partial_files()
            with contextlib.suppress(OSError):  # the terminal is closed
                # A terminal shows ^C, and perhaps a line of progress.
                start = "\n" if os.isatty(2) else ""
                os.write(2, f"{start}{program}: interrupted\n".encode())
            os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, do_nothing)
    stop = watch_signals(end)

    def undo() -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    return undo


def watch_signals(answer: Callable[[int], None]) -> Callable[[], None]:
    """Has a thread of its own call `answer` with the number of each signal that has a handler.

    Args:
      answer: called at once, whatever the main thread does.

    Returns:
      A function that ends the thread.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def run() -> None:
        while byte := os.read(read, 1):
            answer(byte[0])
        os.close(read)

    threading.Thread(target=run, name="signals", daemon=True).start()

    def stop() -> None:
        signal.set_wakeup_fd(before)
        os.close(write)  # so that the thread reads an end

    return stop


def do_nothing(number: int, frame: object) -> None:
    """A handler for signals that a thread answers."""
