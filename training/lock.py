"""This file is the lock of a run folder: one process at a time trains in it."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def lock_run_folder(run_dir: pathlib.Path) -> Iterator[None]:
    """While entered, no other process can lock `run_dir`; a process that dies lets it go.

    Raises:
      ValueError: a run goes on there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
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
