"""End quietly when whoever reads the output of a command has gone, as `head` does."""

import contextlib
import os
import sys
from collections.abc import Iterator

_STATUS = 1  # as that of a console of `rich`


@contextlib.contextmanager
def end_on_closed_pipe() -> Iterator[None]:
    """Ends the process without a traceback if stdout is closed while the block prints to it.

    Raises:
      SystemExit: stdout is closed.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at its exit, and would report that this fails.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_STATUS) from None
