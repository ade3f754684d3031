"""The lock of a run folder."""

import pathlib
import subprocess
import sys

import pytest

from training.lock import lock_run_folder

ROOT = pathlib.Path(__file__).parents[2]
LOCK_AND_WAIT = """
import pathlib, sys
from training.lock import lock_run_folder
with lock_run_folder(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.readline()
"""


def test_one_process_locks_at_a_time_and_a_dead_one_releases(tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(run_dir)]
    other = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=f"in use by process {other.pid} on"):
            with lock_run_folder(run_dir):
                pass
        other.kill()
    with lock_run_folder(run_dir):
        assert "process" in (run_dir / "lock").read_text()
    with lock_run_folder(run_dir):
        pass
