"""End quietly when whoever reads the output of a command has gone, as `head` does."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def end_on_closed_pipe() -> Iterator[None]:
    """Ends the process with status 0 and no word if stdout is closed while the block prints to it.

    Raises:
      SystemExit: stdout is closed.
    """
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # A console of `rich` ends the process itself, with status 1.
        if not isinstance(end, BrokenPipeError) and not isinstance(
            end.__context__, BrokenPipeError
        ):
            raise
        # Python flushes stdout once more at its exit, and would report that this fails.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
