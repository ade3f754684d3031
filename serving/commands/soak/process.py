"""What a process holds, as Linux tells it in /proc."""

import dataclasses
import os
import pathlib

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a process and its children hold.

    Args:
      memory: resident bytes of all of them.
      files: open file descriptors of the process.
      threads: of the process.
      processes: the process and its children.
    """

    memory: int
    files: int
    threads: int
    processes: int


def look_at(pid: int) -> Holdings:
    """What a process holds now.

    Raises:
      ProcessLookupError: there is no such process.
      PermissionError: it is another user's.
    """
    folder = pathlib.Path(f"/proc/{pid}")
    try:
        state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":  # it has ended, and its parent has not asked how
            raise FileNotFoundError
        files = len(os.listdir(folder / "fd"))
        threads = len(os.listdir(folder / "task"))
        family = [pid, *_children(folder)]
        memory = sum(_resident(one) for one in family)
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {pid} in /proc") from None
    return Holdings(memory=memory, files=files, threads=threads, processes=len(family))


def _children(folder: pathlib.Path) -> list[int]:
    found: list[int] = []
    for task in (folder / "task").iterdir():
        try:
            children = (task / "children").read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in map(int, children):
            found += [child, *_children(pathlib.Path(f"/proc/{child}"))]
    return found


def _resident(pid: int) -> int:
    try:
        fields = pathlib.Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # a child that has ended meanwhile
        return 0
    return int(fields[1]) * _PAGE
