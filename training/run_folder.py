"""The run folder: its lock, what stands in it, and whether a run may begin in it.

Imports no jax, so that a signal that comes early can be answered.
"""

import contextlib
import fcntl
import importlib.util
import os
import pathlib
import socket
from collections.abc import Iterator

CHECKPOINTS = "checkpoints"  # the folder of all steps
MANIFEST = "manifest.json"  # in a step's folder, written last
PARTIAL = ".partial"  # suffix of what is being written or removed
CONFIG = "config.json"
LOCK = "lock"  # the first file of all
METRICS = "metrics.jsonl"
MODEL = "model"
SAMPLE = "sample.txt"
LOSS_CURVE = "loss.png"
_OUTPUTS = (METRICS, MODEL, SAMPLE, LOSS_CURVE)


class RunFolderGone(RuntimeError):
    """The run folder was removed or renamed while the run went on."""


class RunFolderLock:
    """The lock that a run holds on its folder."""

    def __init__(self, path: pathlib.Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def check(self) -> None:
        """Raises RunFolderGone unless the folder is still the one that was locked."""
        ours = os.fstat(self._descriptor)
        try:
            now = os.stat(self._path)
        except OSError:
            now = None
        if now is None or not os.path.samestat(ours, now):
            raise RunFolderGone(
                f"the run folder {self._path.parent} was removed or renamed while the run went on; "
                "nothing more can be saved there"
            )


@contextlib.contextmanager
def lock_run_folder(run_dir: pathlib.Path) -> Iterator[RunFolderLock]:
    """Locks `run_dir` for the `with` block; the lock of a process that dies is released.

    Raises:
      ValueError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    # "a+" keeps the content: it names the process that holds the lock.
    with (run_dir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"out: {run_dir} is in use by {file.read().strip() or 'another process'}; wait for "
                "it to end, or choose another --out"
            ) from None
        file.truncate(0)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield RunFolderLock(run_dir / LOCK, file.fileno())


def step_folders(directory: pathlib.Path) -> list[int]:
    """The steps in a folder of checkpoints that have a folder, finished or not, oldest first."""
    names = [path.name for path in directory.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def finished_steps(directory: pathlib.Path) -> list[int]:
    """The finished steps in a folder of checkpoints, oldest first."""
    steps = step_folders(directory)
    return [step for step in steps if (directory / str(step) / MANIFEST).exists()]


def saved_steps(run_dir: pathlib.Path) -> list[int]:
    """The steps that a run has saved, oldest first."""
    return finished_steps(run_dir / CHECKPOINTS)


def is_finished(run_dir: pathlib.Path, steps: int, sample: bool) -> bool:
    """Whether the newest checkpoint is that of step `steps`, and what follows it is written.

    Args:
      run_dir: the run folder.
      steps: the last step of the run.
      sample: whether the run samples text at its end.
    """
    saved = saved_steps(run_dir)
    if not saved or saved[-1] != steps:
        return False
    outputs = [run_dir / MODEL / CONFIG]  # the last file of the model to be written
    outputs += [run_dir / SAMPLE] if sample else []
    outputs += [run_dir / LOSS_CURVE] if importlib.util.find_spec("matplotlib") else []
    checkpoint = run_dir / CHECKPOINTS / str(steps) / MANIFEST
    # What is older is from before the run was resumed with more steps.
    newest = checkpoint.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns >= newest for path in outputs)


def check_out(run_dir: pathlib.Path) -> None:
    """Refuses a folder that cannot be written, or whose files are not a run's; makes nothing.

    A folder with files that a run would not touch, such as a log, is accepted.

    Raises:
      OSError: the folder is a file, or it cannot be made or written.
      ValueError: files there would be overwritten, and no run wrote them.
    """
    nearest = run_dir.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(
            f"out: {run_dir} cannot be a run folder: {nearest} is no folder; choose another --out"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"out: {run_dir} cannot be written: {nearest} is not writable; mend that or choose "
            "another --out"
        )
    for name in (CONFIG, LOCK, METRICS, SAMPLE, LOSS_CURVE):  # to open a FIFO waits for a writer
        if os.path.lexists(run_dir / name) and not (run_dir / name).is_file():
            raise ValueError(
                f"out: {run_dir / name} is no regular file; remove it, or choose another --out"
            )
    for name in (CHECKPOINTS, MODEL):
        if os.path.lexists(run_dir / name) and not (run_dir / name).is_dir():
            raise ValueError(
                f"out: {run_dir / name} is no folder; remove it, or choose another --out"
            )
    if (run_dir / CONFIG).exists() or (run_dir / LOCK).exists():
        return  # `training.config` reads the config, and knows whether it is a run's
    others = [name for name in _OUTPUTS if (run_dir / name).exists()]
    if others:
        raise ValueError(
            f"out: {run_dir} holds {', '.join(others)}, which no run wrote ({CONFIG} is not there) "
            "and this one would overwrite; choose another --out"
        )


def remove_cut_writes(run_dir: pathlib.Path) -> list[str]:
    """Removes the halves of files that a killed process left; a line for each."""
    lines = []
    for partial in sorted([*run_dir.glob(f".*{PARTIAL}"), *run_dir.glob(f"model/.*{PARTIAL}")]):
        size = partial.stat().st_size
        partial.unlink()
        lines.append(f"removed {partial.name}, a file that was cut short ({size / 1e6:,.1f} MB)")
    return lines
