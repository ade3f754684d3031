"""The run folder: its lock, its leftovers, and what may not be overwritten."""

import os
import pathlib
import subprocess
import sys

import pytest

from training.run_folder import (
    RunFolderGone,
    check_out,
    is_finished,
    lock_run_folder,
    remove_cut_writes,
)

ROOT = pathlib.Path(__file__).parents[2]
LOCK_AND_WAIT = """
import pathlib, sys
from training.run_folder import lock_run_folder
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


def test_a_folder_that_is_removed_or_replaced_is_noticed(tmp_path):
    run_dir = tmp_path / "run"
    with lock_run_folder(run_dir) as lock:
        lock.check()
        run_dir.rename(tmp_path / "other")
        with pytest.raises(RunFolderGone, match="run was removed or renamed"):
            lock.check()
        with lock_run_folder(run_dir), pytest.raises(RunFolderGone):
            lock.check()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file", "file is no folder; choose another --out"),
        ("file/deep/run", "file is no folder"),
        ("link", "link is no folder"),
        ("outputs", r"holds model, sample.txt, which no run wrote \(config.json is not there\)"),
    ],
)
def test_refuses_a_folder_that_cannot_be_a_run(path, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "outputs" / "model").mkdir(parents=True)
    (tmp_path / "outputs" / "sample.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((OSError, ValueError), match=f"^out: .*{message}"):
        check_out(tmp_path / path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "config.json", "sample.txt", "loss.png"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/nowhere", path)])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path, name, make):
    """To open a FIFO waits for a writer: a run that was resumed never went on."""
    (tmp_path / "config.json").touch()
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"out: .*{name} is no regular file; remove it"):
        check_out(tmp_path)


def test_a_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(PermissionError, match="out: .* is not writable"):
        check_out(tmp_path / "deep" / "run")


def test_accepts_a_new_folder_and_one_with_a_log(tmp_path):
    (tmp_path / "log.txt").touch()
    check_out(tmp_path)
    check_out(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()


def test_halves_of_files_are_removed_and_named(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / ".config.json.1a2b3c4d.partial").write_text("{")
    (tmp_path / "model" / ".model.safetensors.1a2b3c4d.partial").write_bytes(bytes(300_000))
    (tmp_path / "notes.partial").touch()
    assert remove_cut_writes(tmp_path) == [
        "removed .config.json.1a2b3c4d.partial, a file that was cut short (0.0 MB)",
        "removed .model.safetensors.1a2b3c4d.partial, a file that was cut short (0.3 MB)",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.partial"]


def test_a_run_is_finished_once_all_that_follows_its_last_checkpoint_is_written(tmp_path):
    def write(name, time):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (time, time))

    assert not is_finished(tmp_path, 6, sample=True)
    write("checkpoints/6/manifest.json", 10)
    write("model/config.json", 11)
    write("loss.png", 12)
    assert is_finished(tmp_path, 6, sample=False)
    assert not is_finished(tmp_path, 6, sample=True)
    write("sample.txt", 9)  # of a run with fewer steps
    assert not is_finished(tmp_path, 6, sample=True)
    write("sample.txt", 13)
    assert is_finished(tmp_path, 6, sample=True)
    assert not is_finished(tmp_path, 7, sample=True)


@pytest.mark.parametrize("name", ["checkpoints", "model"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} is no folder; remove it"):
        check_out(tmp_path)
