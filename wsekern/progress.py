"""Say what a program is doing while it computes or compiles, from the third second on."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

# What is over sooner says nothing. Python and imports take about the second before.
FIRST_SECONDS = 2.0


@contextlib.contextmanager
def show_progress(doing: str, stream: TextIO | None = None) -> Iterator[None]:
    """Prints `doing` and the seconds so far while the block runs, if that takes two seconds.

    On a terminal one line counts the seconds, and is wiped at the end. Elsewhere, as in a log, a
    line is printed after 2, 20, 200 ... seconds.

    Args:
      doing: what the block does, such as "compiling the step".
      stream: where to print; by default stderr, so that what a program prints stays its own.
    """
    stream = sys.stderr if stream is None else stream
    done = threading.Event()
    # XLA computes and compiles outside Python's lock, so this thread gets its turns.
    teller = threading.Thread(target=_tell, args=(doing, stream, done), daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()


def _tell(doing: str, stream: TextIO, done: threading.Event) -> None:
    begun, wait, on_terminal = time.monotonic(), FIRST_SECONDS, stream.isatty()
    said = ""
    while not done.wait(max(0.0, begun + wait - time.monotonic())):
        said = f"{doing}: {time.monotonic() - begun:.0f} s so far"
        # A closed stream must not end the computation.
        with contextlib.suppress(OSError, ValueError):
            stream.write(f"\r{said}" if on_terminal else f"{said}\n")
            stream.flush()
        wait = wait + 1 if on_terminal else wait * 10
    if said and on_terminal:
        with contextlib.suppress(OSError, ValueError):
            stream.write("\r" + " " * len(said) + "\r")
            stream.flush()
