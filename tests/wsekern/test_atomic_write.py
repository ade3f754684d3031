"""Writing a file whole or not at all."""

import pytest

from wsekern.atomic_write import atomic_write


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
