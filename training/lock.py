"""Lock a run folder, so that one process at a time trains in it."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def lock_run_folder(run_dir: pathlib.Path) -> Iterator[None]:
    """Locks `run_dir` for the `with` block; the lock of a process that dies is released.

    Raises:
      ValueError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # "a+" keeps the content: it names the process that holds the lock.
    with (run_dir / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"out: {run_dir} is in use by {file.read().strip() or 'another process'}; wait for "
                "it to end, or choose another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
