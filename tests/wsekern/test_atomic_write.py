"""Writing a file whole or not at all."""

import errno
import os

import pytest

from wsekern.atomic_write import atomic_write
from wsekern.error_line import error_line, without_controls


def test_the_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_raises_leaves_the_old_file_and_nothing_beside(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="half way"), atomic_write(path) as file:
        file.write(b"af")
        raise ValueError("half way")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with atomic_write(link) as file:
        file.write(b"after")
    assert link.is_symlink() and target.read_text() == "after"


def test_a_full_disk_is_named_with_the_file(tmp_path):
    with pytest.raises(OSError) as error, atomic_write(tmp_path / "figures.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    line = error_line(error.value)
    assert line.startswith(f"{tmp_path / 'figures.json'}: No space left on device; make room")


def test_an_error_is_one_line_for_any_terminal():
    assert error_line(ValueError("a\nb\x1b[2Jc\u202ed é")) == r"a\nb\x1b[2Jc\u202ed é"
    assert without_controls("a\tb\nc\x1b[2J\x9bd\r🏴‍☠️é") == "a\tb\nc\\x1b[2J\\x9bd\\r🏴‍☠️é"
    assert error_line(FileNotFoundError(2, "No such file", "a\tb")) == r"a\tb: No such file"
